"""What the trainings of the harness have in common: text, tokenizer, config, and undisturbed runs."""

import json
import os

import zstandard

from bipe_jax.config.spec import parse_source
from bipe_jax.data import prepare, sources, tokenizer

STEPS, EVERY = 100, 10
_VOCAB = 512
_SHARDS, _SHARD_BYTES = 24, 1000  # more than are open at a time; the run reads them about once


def make(root: str) -> None:
    """Writes text, tokenizer and prepared data into a directory."""
    documents = sources.documents(parse_source("quickstart:train"))
    texts = [d["text"][:_SHARD_BYTES] for d, _ in zip(documents, range(2 * _SHARDS), strict=False)]
    for name, some in (("train", texts[::2]), ("held_out", texts[1::2])):
        os.makedirs(os.path.join(root, name))
        for number, text in enumerate(some):
            # Documents of one line, in a frame that has a checksum.
            lines = [json.dumps({"text": line}) + "\n" for line in text.split("\n\n") if line]
            data = zstandard.ZstdCompressor(write_checksum=True).compress("".join(lines).encode())
            with open(
                os.path.join(root, name, f"{number:05}-of-{_SHARDS:05}.jsonl.zst"), "wb"
            ) as file:
                file.write(data)
    path = os.path.join(root, "tokenizer.model")
    with open(path, "wb") as file:
        file.write(tokenizer.train(texts, _VOCAB, 100_000).model)
    prepare.prepare(f"{root}/train/*", f"{root}/prepared", path, 32, workers=1)


def arguments(root: str, processes: int, data: str) -> list[str]:
    """Of `python -m bipe_jax.train`, without the workdir.

    Args:
      root: where `make` has written. data: the same, or a directory that has a copy of train/.
    """
    # A stream gives other blocks to another number of readers; prepared data do not.
    train = f"{data}/train/*.jsonl.zst" if processes == 1 else f"prepared:{root}/prepared"
    values = {
        "steps": STEPS,
        "checkpoint.every": EVERY,
        "tokenizer.path": f"{root}/tokenizer.model",
        "data.train": train,
        "data.evaluation": f"{root}/held_out/*.jsonl.zst",
        "data.shuffle_blocks": 16,
        "data.workers": 1,
        "data.on_change": "continue",  # a shard is damaged, and put back
        "mesh.devices": processes,
        "evaluation.lengths": "(32,64)",
    }
    return ["--config=configs/smoke.py", *(f"--config.{k}={v}" for k, v in values.items())]
