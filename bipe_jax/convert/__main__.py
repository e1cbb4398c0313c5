"""Checkpoints of other projects in and out:

python -m bipe_jax.convert from-authors SRC DST   a checkpoint of BiPE's authors -> a checkpoint of ours
python -m bipe_jax.convert from-llama SRC DST     a Llama checkpoint of Hugging Face's -> one of ours
"""

import argparse

import jax

from bipe_jax import checkpoint, cli


def _from_authors(args) -> None:
    from bipe_jax.convert import authors, incoming

    incoming.convert(args.source, args.destination, authors, args.tokenizer)


def _from_llama(args) -> None:
    from bipe_jax.convert import incoming, llama

    incoming.convert(args.source, args.destination, llama, args.tokenizer)


def _add_incoming(commands, name: str, run, what: str) -> None:
    parser = commands.add_parser(name, help=f"{what} -> a checkpoint of ours")
    parser.add_argument("source", help=f"{what}: a directory with config.json and its tensors")
    parser.add_argument("destination", help="a workdir that has no checkpoint yet")
    parser.add_argument("--tokenizer", default="", help="a SentencePiece file (the source's)")
    parser.set_defaults(run=run)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bipe_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_incoming(commands, "from-authors", _from_authors, "a checkpoint of BiPE's authors")
    _add_incoming(commands, "from-llama", _from_llama, "a Llama checkpoint of Hugging Face's")
    args = parser.parse_args()
    checkpoint.quiet()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    args.run(args)


if __name__ == "__main__":
    with cli.user_errors():
        main()
