"""Tokens a second of each stage of the training stream, on one core, and what annotation costs.

python -m benchmarks.data [--data=GLOBS] [--tokenizer=FILE] [--rounds=5]

The stages run one after the other on the same documents, all of them once a round; a row is the
median of the rounds. "Stream" is the whole of it, as training uses it.
"""

import argparse
import itertools
import statistics
import time

import numpy as np

from bipe_jax import segments, tokenizer
from bipe_jax.data import sources
from bipe_jax.data.batches import annotate, stream
from configs import quickstart

_DOCUMENTS = 64


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="quickstart:train")
    parser.add_argument(
        "--tokenizer", default="", help="a SentencePiece .model (trained on --data)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    config = quickstart.get_config()
    config.data.train = args.data
    config.sequence_length = 1024
    if args.tokenizer:
        tokens = tokenizer.load(args.tokenizer)
    else:
        texts = (d["text"][:20_000] for d in sources.documents(args.data))
        tokens = tokenizer.train(texts, config.model.vocab_size, config.tokenizer.train_bytes)
    rule = segments.resolve(config.segments.rule, tokens.pieces())
    config.segments.separators = rule.separators

    documents = list(itertools.islice(sources.documents(args.data), _DOCUMENTS))
    encoded = [tokens.encode(d["text"]) for d in documents]
    count = sum(map(len, encoded))
    length = config.sequence_length + 1
    rows = config.batch_size
    blocks = np.concatenate(encoded)[: count // (length * rows) * length * rows]
    batches = blocks.reshape(-1, rows, length)
    if not len(batches):
        parser.error(f"--data={args.data} has fewer than {rows * length} tokens")

    def read():
        for _ in itertools.islice(sources.documents(args.data), _DOCUMENTS):
            pass

    def encode():
        for document in documents:
            tokens.encode(document["text"])

    def annotate_all():
        for batch in batches:
            annotate(batch, rule)

    def whole_stream():
        iterator = iter(stream(config, tokens))
        for _ in range(len(batches)):
            next(iterator)
        iterator.close()

    stages = {
        "read (decompress, parse)": (read, count),
        "tokenise": (encode, count),
        "annotate (coordinates)": (annotate_all, batches[:, :, 1:].size),
        "stream": (whole_stream, batches[:, :, 1:].size),
    }
    times = {name: [] for name in stages}
    for _ in range(args.rounds):
        for name, (run, _) in stages.items():
            times[name].append(_seconds(run))
    print(f"{args.data}: {len(documents)} documents, {count:,} tokens, {args.rounds} rounds")
    print(f"{'stage':26} {'M tokens/s':>10} {'min-max':>15}")
    per_token = {}
    for name, (_, size) in stages.items():
        rates = sorted(size / t / 1e6 for t in times[name])
        per_token[name] = 1 / statistics.median(rates)
        print(f"{name:26} {statistics.median(rates):10.2f} {rates[0]:7.2f}-{rates[-1]:<7.2f}")
    share = per_token["annotate (coordinates)"] / per_token["tokenise"]
    print(f"annotation costs {share:.2%} of tokenisation")


if __name__ == "__main__":
    main()
