"""What attention gains by skipping what cannot count: evaluation, training and decoding.

python -m benchmarks.skipping [--part=evaluation] [--checkpoint=DIR] [--encodings=bipe_alibi,alibi,rope]
  [--lengths=2048,8192,32768] [--whole=8192] [--rounds=3]

The quickstart's size, with random parameters or those of a checkpoint of a model of that size; one text, with
segments of random lengths, 12 tokens in the mean. Each round runs every program once, in the opposite order
of the round before. "skips" leaves out what is proved to add nothing, "whole" does not. Columns:

evaluation  ms a token of the forward pass and the loss of all tokens, median and fastest; MiB of temporaries;
            how many times as fast as the last encoding, whole: the median of the rounds. Encodings
            that can skip have "whole" up to --whole tokens.
training    ms of the gradients of --tokens tokens, in rows of each length; the ratio is whole / skips
decoding    ms a token after so many tokens; MiB of the cache; the ratio as in evaluation
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import bipe_jax.attention as attention_package
from benchmarks.decode import cached
from benchmarks.timing import Program, Timed, measure
from bipe_jax import model, plan
from bipe_jax.evaluation import loaded
from bipe_jax.loss import cross_entropy_sum, score
from bipe_jax.positions import NAMED
from bipe_jax.segments import Rule, coordinates
from configs import quickstart

_SEPARATOR, _TOKENS_PER_SEGMENT = 1, 12
_STEPS = 16  # tokens that are decoded in a round


def place(encoding: str, path: str) -> loaded.LoadedModel:
    config = quickstart.get_config()
    config.position.absolute, config.position.relative = NAMED[encoding]
    config = plan.make(config).with_rule(Rule((_SEPARATOR,)))
    params = jax.jit(functools.partial(model.init, config))(jax.random.key(0))
    if path:
        trained = loaded.load(path).params
        params |= {name: trained[name] for name in params if name in trained}
    return loaded.on_all_devices(config, params)


def batch_of(placed, rows: int, length: int) -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, placed.config.model.vocab_size, (rows, length))
    ends = rng.random(tokens.shape) < 1 / _TOKENS_PER_SEGMENT
    tokens = np.where(ends, _SEPARATOR, tokens).astype(np.int32)
    return {"tokens": tokens, **coordinates(tokens, placed.rule)}


def compiled(function, placed, batch, skips: bool) -> Program:
    """A program of parameters and a batch, that skips from the first token on or not at all."""
    usual, attention_package.SKIPS_FROM = attention_package.SKIPS_FROM, 0 if skips else 1 << 40
    arguments = placed.params, {name: jnp.asarray(x) for name, x in batch.items()}
    with jax.set_mesh(placed.mesh):
        program = jax.jit(function).lower(*arguments).compile()
    attention_package.SKIPS_FROM = usual

    def run():
        jax.block_until_ready(program(*arguments))

    return Program(run, program.memory_analysis().temp_size_in_bytes)


def evaluation(placed, length: int, skips: bool) -> Program:
    config = placed.config

    def log_probabilities(params, batch):
        hidden, output = model.hidden(config, params, batch)
        targets = jnp.roll(batch["tokens"], -1, axis=1)
        return score(hidden.astype(output.dtype), output, targets, config.loss_chunk)

    return compiled(log_probabilities, placed, batch_of(placed, 1, length), skips)


def training(placed, length: int, tokens: int, skips: bool) -> Program:
    config = placed.config

    def loss(params, batch):
        hidden, output = model.hidden(config, params, batch)
        targets = jnp.roll(batch["tokens"], -1, axis=1)
        weights = jnp.ones(targets.shape)
        return cross_entropy_sum(hidden, output, targets, weights, config.loss_chunk)[0]

    batch = batch_of(placed, tokens // length, length)
    return compiled(jax.grad(loss), placed, batch, skips)


def show(results: dict, part: str, last: str) -> None:
    """A line for each program (encoding, skips, length); `last`: whose times are divided by theirs."""
    for (encoding, skips, length), timed in results.items():
        line = f"{encoding:12}{'skips' if skips else 'whole':7}{length:8}"
        if not isinstance(timed, Timed):
            print(f"{line} left out: {timed}")
            continue
        unit = {"evaluation": length, "training": 1, "decoding": _STEPS}[part]
        median, fastest = (1e3 * f(timed.seconds) / unit for f in (statistics.median, min))
        line += f"{median:12.4f}{fastest:12.4f}{timed.memory / 2**20:9,.0f}"
        base = results.get((encoding if part == "training" else last, False, length))
        if isinstance(base, Timed):
            pairs = [b / a for a, b in zip(timed.seconds, base.seconds, strict=True)]
            line += f"{statistics.median(pairs):8.2f}"
        print(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="evaluation", help="evaluation, training or decoding")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--encodings", default="bipe_alibi,alibi,rope")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--whole", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch in training")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    names = args.encodings.split(",")
    placed = {name: place(name, args.checkpoint) for name in names}
    device = jax.devices()[0].device_kind
    print(
        f"{args.part}, {'trained' if args.checkpoint else 'random'}, {device}, jax {jax.__version__}"
    )
    builders = {}
    for length in map(int, args.lengths.split(",")):
        for name, of_model in placed.items():
            bounded = bool(of_model.config.encodings.scoring)
            if args.part == "decoding":
                program, _ = cached(of_model, 1, length, _STEPS)
                builders[name, bounded, length] = lambda program=program: program
                continue
            make = functools.partial(evaluation, of_model, length)
            if args.part == "training":
                make = functools.partial(training, of_model, length, args.tokens)
            for skips in (True, False) if bounded else (False,):
                if skips or not bounded or length <= args.whole:
                    builders[name, skips, length] = functools.partial(make, skips)
    show(measure(builders, args.rounds), args.part, names[-1])


if __name__ == "__main__":
    main()
