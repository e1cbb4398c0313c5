"""Trains a small model on passkey prompts and tests it with unseen keys.

python -m benchmarks.passkey --workdir=runs/passkey [--encoding=bipe_rope] [--steps=500]
  [--lengths=128,256,512] [--samples=20]

A check of `bipe_jax.tasks` as a whole, and an experiment: a model of 128 tokens that answers all prompts
of 128 tokens shows at longer ones how far its positional encoding reaches. Two layers of width 64;
minutes on two CPU cores. The encodings are those of configs/quickstart.py.
"""

import argparse
import itertools
import json
import os
import random

from bipe_jax import cli
from bipe_jax.config.spec import parse_source
from bipe_jax.data import sources, tokenizer
from bipe_jax.tasks import generators, haystack, samples
from bipe_jax.tasks.evaluation import Settings, evaluate, tables
from bipe_jax.training.trainer import train
from configs import quickstart

_LENGTH = 128
_SEED = 1  # not that of the evaluation
_PROMPTS = 8000
_VOCAB_SIZE = 1024


def write(path: str, used: tokenizer.Tokenizer, indices: range) -> None:
    """Prompts of 100 to 128 tokens, each with its answer, at any depth."""
    task, hay = generators.task("passkey"), haystack.noise()
    with open(path, "w", encoding="utf-8") as file:
        for index in indices:
            rng = random.Random(index)
            length, depth = rng.randint(100, _LENGTH), rng.random()
            sample = samples.make(task, used, hay, length, depth, _SEED, index)
            text = f"{sample.prompt} {sample.answers[0]}.\n"
            file.write(json.dumps({"text": text}) + "\n")


def get_config(workdir: str, encoding: str, steps: int):
    """The config; writes the data that it names."""
    os.makedirs(workdir, exist_ok=True)
    paths = {name: os.path.join(workdir, f"{name}.jsonl") for name in ("train", "held_out")}
    model = os.path.join(workdir, "words.model")
    task, hay = generators.task("passkey"), haystack.noise()
    drafts = [task.draw(random.Random(i), 0.5) for i in range(300)]
    prompts = [samples.compose(draft, hay.take(0, 300)) for draft in drafts]
    plays = (d["text"][:3000] for d in sources.documents(parse_source("quickstart:train")))
    used = tokenizer.train([*prompts, *itertools.islice(plays, 40)], _VOCAB_SIZE, 400_000)
    with open(model, "wb") as file:
        file.write(used.model)
    write(paths["train"], used, range(_PROMPTS))
    write(paths["held_out"], used, range(_PROMPTS, _PROMPTS + 100))
    c = quickstart.get_config(encoding)
    c.steps, c.sequence_length = steps, _LENGTH
    c.model.layers, c.model.width, c.model.feed_forward = 2, 64, 128
    c.model.vocab_size = _VOCAB_SIZE
    c.model.remat = "none"
    c.tokenizer.path = model
    c.data.train, c.data.evaluation = paths["train"], paths["held_out"]
    c.data.packing, c.data.separate_documents = "document", True
    c.checkpoint.every = steps
    c.evaluation.lengths = (64,)
    return c


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passkey", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--encoding", default="bipe_rope", help="(bipe_rope)")
    parser.add_argument("--steps", type=int, default=500, help="(500)")
    parser.add_argument("--lengths", default="128,256,512", help="(128,256,512)")
    parser.add_argument("--samples", type=int, default=20, help="at each length and depth (20)")
    args = parser.parse_args()
    cli.quiet()
    cli.cache_programs()
    train(get_config(args.workdir, args.encoding, args.steps), args.workdir)
    lengths = tuple(int(length) for length in args.lengths.split(","))
    print(tables(evaluate(args.workdir, Settings(("passkey",), lengths, samples=args.samples))))


if __name__ == "__main__":
    with cli.user_errors():
        main()
