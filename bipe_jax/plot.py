"""Draws perplexity by length; several runs in one picture:

python -m bipe_jax.plot runs/quickstart runs/rope runs/alibi --output=comparison.png
"""

import argparse
import json
import logging
import math
import os

import matplotlib

from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir

_LOG = logging.getLogger("bipe_jax.plot")

# Distinct for colour-blind readers too (Okabe & Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
COLOURS = len(_COLOURS)


def draw(evaluations: list[dict], path: str) -> None:
    """One panel a data set, one curve a run, both axes logarithmic; bars are standard errors.

    Args:
      evaluations: what `evaluate` writes: {"name", "training_length", "results"} each. There are
        COLOURS colours: those beyond are grey and without names, so what matters comes first.
      path: the picture's file; its ending chooses the format.

    Raises:
      UserError: the file cannot be written.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row["set"] for e in evaluations for row in e["results"]))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(max(4.6 * len(sets), 6.4), 4.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], sets, strict=True):
        for number, evaluation in enumerate(evaluations):
            rows = [row for row in evaluation["results"] if row["set"] == name]
            errors = [row["perplexity_error"] or 0 for row in rows]
            axis.errorbar(
                [row["length"] for row in rows],
                [row["perplexity"] for row in rows],
                yerr=[0 if math.isnan(error) else error for error in errors],
                **_look(number, len(evaluations), evaluation["name"]),
            )
        _finish(axis, evaluations, name)
    axes[0][0].set_ylabel("perplexity of the same targets")
    if len(evaluations) > 1:
        handles, labels = axes[0][0].get_legend_handles_labels()
        columns = int(figure.get_figwidth() / (0.55 + 0.085 * max(map(len, labels))))  # inches
        figure.legend(handles, labels, loc="outside lower center", ncols=min(max(columns, 1), 6))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    plt.close(figure)


def _look(number: int, count: int, name: str) -> dict:
    """How the curve of a run is drawn."""
    if number < COLOURS:
        look = {"label": name, "color": _COLOURS[number], "marker": _MARKERS[number]}
        return look | {"markersize": 5, "capsize": 2}
    label = f"{count - COLOURS} others" if number == COLOURS else None
    return {"label": label, "color": "#B8B8B8", "linewidth": 1, "elinewidth": 0.5, "zorder": 1}


def _finish(axis, evaluations, name):
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lengths = sorted({row["length"] for e in evaluations for row in e["results"]})
    axis.set_title(name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("length (tokens)")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    training = {e["training_length"] for e in evaluations}
    if len(training) == 1:
        axis.axvline(training.pop(), color="grey", linestyle=":", linewidth=1)
        axis.annotate(
            "training length", (lengths[0], 0.98), xycoords=("data", "axes fraction"), color="grey",
            xytext=(4, 0), textcoords="offset points", va="top", fontsize=8,
        )  # fmt: skip
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def read_evaluation(path: str) -> dict:
    """The evaluation.json of a run's directory, under that directory's name. Raises UserError."""
    file_name = Workdir(path).evaluation
    try:
        with open(file_name, encoding="utf-8") as file:
            return json.load(file) | {"name": os.path.basename(os.path.abspath(path))}
    except OSError as error:
        raise UserError(
            f"{file_name} cannot be read ({error.strerror}): evaluate that run first"
        ) from None
    except ValueError:
        raise UserError(f"{file_name} is not an evaluation's JSON") from None


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", help="directories that hold an evaluation.json")
    parser.add_argument("--output", default="extrapolation.png", help="the picture to write")
    args = parser.parse_args()
    draw([read_evaluation(path) for path in args.runs], args.output)
    _LOG.info(f"Wrote {args.output}")


if __name__ == "__main__":
    from bipe_jax import cli  # defines flags: not for those who import `draw`

    with cli.user_errors():
        main()
