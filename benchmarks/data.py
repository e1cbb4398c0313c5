"""Tokens a second of the data engine, beside the bare tokenizer and a Hugging Face pipeline.

python -m benchmarks.data [--data=GLOBS] [--tokenizer=FILE] [--prepared=DIR] [--huggingface]
  [--length=1024] [--megabytes=8] [--rounds=5] [--workers=0,1,-1]

Each round runs every row once, in the opposite order of the round before. Rows:

tokenise           SentencePiece alone, one thread, texts in memory: the unit of the others
read               decompress and parse
annotate           coordinates, targets and weights of blocks
stream, N workers  the whole stream, from files to annotated batches, N threads tokenising; `cpu` is
                   tokens a second of processor time
prepared           the same from prepared data (made here, or that of --prepared)
huggingface        `datasets` and `tokenizers` with the same pieces: documents joined and cut into
                   blocks, without coordinates (streaming, one process)

Then the time to the first batch of a new stream, and of one that is resumed in the middle.
Medians; /tokenise is the median of the rounds' ratios.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time

import numpy as np

from bipe_jax import plan, segments
from bipe_jax.config.spec import PREPARED, parse_source
from bipe_jax.data import sources, tokenizer
from bipe_jax.data.batches import Batches, annotate, workers_of
from bipe_jax.data.prepare import prepare
from configs import quickstart


def huggingface(paths, tokens, length: int):
    """An iterable of blocks, which are lists of token ids of the same unigram model."""
    import datasets
    import tokenizers
    from tokenizers import models, pre_tokenizers

    processor = tokens._processor
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(tokens.vocab_size)]
    encoder = tokenizers.Tokenizer(
        models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True)
    )
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)

    def encode(batch):
        return {"ids": [[tokens.bos_id, *e.ids] for e in encoder.encode_batch(batch["text"])]}

    def cut(batch):
        flat = list(itertools.chain.from_iterable(batch["ids"]))
        whole = len(flat) // length * length
        return {"ids": [flat[i : i + length] for i in range(0, whole, length)]}

    lines = datasets.load_dataset("json", data_files=paths, split="train", streaming=True)
    names = lines.column_names or ["text", "meta"]
    blocks = lines.map(encode, batched=True, batch_size=64, remove_columns=names)
    return blocks.map(cut, batched=True, batch_size=64)


def batches_of(config, tokens, count: int):
    """A function that takes batches of about so many tokens from a new stream, without prefetched ones."""
    size = config.batch_size * config.sequence_length
    calls = max(count // size, 1)

    def run():
        with contextlib.closing(Batches(config, tokens)) as batches:
            for _ in range(calls):
                next(batches)
        return calls * size

    return run


def measured(rows: dict, rounds: int) -> dict:
    """The (seconds, processor seconds, tokens) of each round, by name."""
    timings = {name: [] for name in rows}
    for i in range(-1, rounds):
        for name in list(rows)[:: -1 if i % 2 else 1]:
            start, used = time.perf_counter(), time.process_time()
            tokens = rows[name]()
            if i >= 0:
                times = (time.perf_counter() - start, time.process_time() - used)
                timings[name].append((*times, tokens))
    return timings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="quickstart:train")
    parser.add_argument(
        "--tokenizer", default="", help="a SentencePiece .model (4096, trained here)"
    )
    parser.add_argument("--prepared", default="", help="a directory that is prepared already")
    parser.add_argument("--huggingface", action="store_true", help="needs datasets and tokenizers")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--megabytes", type=float, default=24, help="of text, a row and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="0,1,-1")
    args = parser.parse_args()

    config = quickstart.get_config()
    config.data.train, config.data.evaluation = args.data, ""
    config.sequence_length, config.batch_size = args.length, 32
    config.data.shuffle_blocks = 256  # what is made ahead and never taken is work, too
    if args.tokenizer:
        tokens = tokenizer.load(args.tokenizer)
    else:
        texts = (d["text"][:20_000] for d in sources.documents(parse_source(args.data)))
        tokens = tokenizer.train(texts, config.model.vocab_size, config.tokenizer.train_bytes)
    rule = segments.rule_of(config, tokens.pieces(), tokens.bos_id)
    config = plan.make(config).with_rule(rule)

    size, texts = 0, []
    for document in sources.documents(parse_source(args.data)):
        texts.append(document["text"])
        size += len(texts[-1])
        if size > args.megabytes * 1e6:
            break
    encoded = np.concatenate([tokens.encode(text) for text in texts])
    count = len(encoded)
    blocks = np.resize(encoded, (count // (args.length + 1) // 8 * 8, args.length + 1))
    blocks = blocks.reshape(-1, 8, args.length + 1)

    def tokenise():
        for text in texts:
            tokens.encode(text)
        return count

    def read():
        for _ in itertools.islice(sources.documents(parse_source(args.data)), len(texts)):
            pass
        return count

    def annotated():
        for block in blocks:
            annotate(block, rule)
        return blocks.size

    with contextlib.ExitStack() as stack:
        rows = {"tokenise": tokenise, "read": read, "annotate": annotated}

        for workers in map(int, args.workers.split(",")):
            c = config.replace({"data.workers": workers})
            rows[f"stream, {workers_of(c)} workers"] = batches_of(c, tokens, count)
        directory = args.prepared
        if not directory:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            model, directory = (
                os.path.join(scratch, "tokenizer.model"),
                os.path.join(scratch, "data"),
            )
            with open(model, "wb") as file:
                file.write(tokens.model)
            prepare(args.data, directory, model, args.length)
        c = config.replace({"data.train": f"{PREPARED}:{directory}"})
        rows["prepared"] = batches_of(c, tokens, count)
        prepared = c
        if args.huggingface:
            tokenised = huggingface(sources.files.find(args.data), tokens, args.length + 1)

            def from_huggingface():
                taken = itertools.islice(tokenised, max(count // (args.length + 1), 1))
                return sum(len(block["ids"]) for block in taken)

            rows["huggingface"] = from_huggingface
        results = measured(rows, args.rounds)
        print(
            f"{args.data}: {len(texts)} documents, {count:,} tokens of {tokens.vocab_size} pieces, "
            f"blocks of {args.length}; {args.rounds} rounds; {os.cpu_count()} cores"
        )
        print(f"{'row':20} {'M tokens/s':>10} {'min':>8} {'max':>8} {'cpu':>8} {'/tokenise':>9}")
        bare = [n / s for s, _, n in results["tokenise"]]
        for name, timed in results.items():
            rates = [n / s for s, _, n in timed]
            shares = statistics.median(r / b for r, b in zip(rates, bare, strict=True))
            cpu = statistics.median(n / max(used, 1e-9) for _, used, n in timed)
            print(
                f"{name:20} {statistics.median(rates) / 1e6:10.2f} {min(rates) / 1e6:8.2f} "
                f"{max(rates) / 1e6:8.2f} {cpu / 1e6:8.2f} {shares:9.3f}"
            )
        for name, c in (("stream", config), ("prepared", prepared)):
            first, resumed = starts(c, tokens, args.rounds)
            print(
                f"{name}: first batch after {first * 1e3:.0f} ms, going on after {resumed * 1e3:.0f} ms"
            )


def starts(config, tokens, rounds: int) -> tuple[float, float]:
    """Median seconds to the first batch of a new stream, and of one that is resumed."""
    first, resumed = [], []
    with contextlib.closing(Batches(config, tokens)) as batches:
        for _ in range(1000):
            next(batches)
        middle = json.loads(json.dumps(batches.get_state()))
    for times, state in ((first, None), (resumed, middle)):
        for _ in range(rounds):
            start = time.perf_counter()
            with contextlib.closing(Batches(config, tokens)) as batches:
                if state:
                    batches.set_state(state)
                next(batches)
                times.append(time.perf_counter() - start)
    return statistics.median(first), statistics.median(resumed)


if __name__ == "__main__":
    main()
