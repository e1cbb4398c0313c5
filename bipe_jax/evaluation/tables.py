"""The results of evaluations as text for a terminal."""

import math
import statistics

from bipe_jax.report.text import table


def tables(result: dict) -> str:
    """The tables of an evaluation; `result` is of `evaluator.evaluate`."""
    head = (
        f"{result['protocol']}; {result['bos_rule']}; rule {result['segment_rule']}; trained at "
        f"{result['training_length']:,} tokens"
    )
    parts = (head, _perplexities(result["results"]), _unseen(result["unseen"]))
    return "\n\n".join(parts)


def written(output: str) -> str:
    """The line that names the files of an evaluation."""
    return f"Wrote {output}/evaluation.json, extrapolation.png and report.html"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _perplexities(rows: list[dict]) -> str:
    """Perplexity ± its standard error over documents, and statistics of the data."""
    head = ("data set", "length", "perplexity", "±", "bits/byte", "±", "tokens", "docs",
            "tokens/segment", "p99", "segments")  # fmt: skip
    lines = [
        (
            row["set"],
            f"{row['length']:,}",
            f"{row['perplexity']:.2f}",
            _number(row["perplexity_error"], 2),
            f"{row['bits_per_byte']:.3f}",
            _number(row["bits_per_byte_error"], 3),
            f"{row['tokens']:,}",
            f"{row['documents']}",
            f"{row['segment_tokens_mean']:.1f}",
            f"{row['segment_tokens_p99']:.0f}",
            f"{row['segments_per_block']:.0f}",
        )
        for row in rows
    ]
    return table(head, lines)


def _unseen(rows: list[dict]) -> str:
    """The largest value of each coordinate, and the share of targets beyond the range in training."""
    head = ["beyond training", "length"]
    coordinates = list(dict.fromkeys(row["coordinate"] for row in rows))
    for name in coordinates:
        head += [f"{name} to", "share"]
    lines = {}
    for row in rows:
        line = lines.setdefault((row["set"], row["length"]), [row["set"], f"{row['length']:,}"])
        line += [f"{row['max']:,} / {row['trained_max']:,}", f"{row['share']:.0%}"]
    return table(tuple(head), [tuple(line) for line in lines.values()])


_SPANS = {
    "segment": {
        "own segment": (0, 0),
        "1 before": (1, 1),
        "2-7": (2, 7),
        "8 and more": (8, math.inf),
    },
    "position": {"0-15 tokens": (0, 15), "16-127": (16, 127), "128 and more": (128, math.inf)},
}


def attention(result: dict) -> str:
    """Means over the heads for each length and layer; `result` is of `attention_distance.analyse`."""
    columns: dict = {}
    for row in result["heads"]:
        line = columns.setdefault((row["length"], row["layer"]), {"entropy": [], "first token": []})
        line["entropy"].append(row["entropy"])
        line["first token"].append(row["first"])
    for row in result["results"]:
        for name, (low, high) in _SPANS[row["by"]].items():
            share = sum(b["weight"] for b in row["bins"] if low <= b["from"] <= high)
            columns[row["length"], row["layer"]].setdefault(name, []).append(share)
    lines = [
        (
            f"{length:,}, {layer}",
            f"{statistics.fmean(line.pop('entropy')):.2f}",
            *(f"{statistics.fmean(shares):.1%}" for shares in line.values()),
        )
        for (length, layer), line in columns.items()
    ]
    names = [name for spans in _SPANS.values() for name in spans]
    return table(("length, layer", "entropy", "first token", *names), lines)
