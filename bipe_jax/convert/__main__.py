"""Checkpoints of other projects in and out:

python -m bipe_jax.convert from-authors SRC DST   a checkpoint of BiPE's authors -> a checkpoint of ours
python -m bipe_jax.convert from-llama SRC DST     a Llama checkpoint of Hugging Face's -> one of ours
python -m bipe_jax.convert from-hf SRC DST        what to-hf wrote -> a checkpoint of ours, the same again
python -m bipe_jax.convert to-hf CHECKPOINT DST   a checkpoint of ours -> a directory for transformers
"""

import argparse

import jax

from bipe_jax import cli


def _from_authors(args) -> None:
    from bipe_jax.convert import authors, incoming

    incoming.convert(args.source, args.destination, authors, args.tokenizer)


def _from_llama(args) -> None:
    from bipe_jax.convert import incoming, llama

    incoming.convert(args.source, args.destination, llama, args.tokenizer)


def _from_hf(args) -> None:
    from bipe_jax.convert import from_hf, incoming

    incoming.convert(args.source, args.destination, from_hf, args.tokenizer)


def _to_hf(args) -> None:
    from bipe_jax.convert import to_hf

    to_hf.convert(args.source, args.destination)


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
    _add_incoming(commands, "from-hf", _from_hf, "what to-hf wrote, perhaps trained on")
    outgoing = commands.add_parser("to-hf", help="a checkpoint of ours -> for transformers")
    outgoing.add_argument(
        "source", help="a workdir (its latest checkpoint) or one step's directory"
    )
    outgoing.add_argument("destination", help="a directory that does not exist, or is empty")
    outgoing.set_defaults(run=_to_hf)
    args = parser.parse_args()
    cli.quiet()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    args.run(args)


if __name__ == "__main__":
    with cli.user_errors():
        main()
