"""Converts checkpoints from and to other projects.

python -m bipe_jax.convert from-authors SRC DST   a checkpoint of BiPE's authors -> a checkpoint of ours
python -m bipe_jax.convert from-llama SRC DST     a Llama checkpoint of Hugging Face's -> one of ours
python -m bipe_jax.convert from-hf SRC DST        the output of to-hf -> a checkpoint of ours, the same again
python -m bipe_jax.convert to-hf CHECKPOINT DST   a checkpoint of ours -> a directory for transformers
"""

import argparse

import jax

from bipe_jax import cli
from bipe_jax.convert import authors, from_hf, incoming, llama, to_hf

# Command -> the module of the source's format, and a description of the source.
_INCOMING = {
    "from-authors": (authors, "a checkpoint of BiPE's authors"),
    "from-llama": (llama, "a Llama checkpoint of Hugging Face's"),
    "from-hf": (from_hf, "the output of to-hf, perhaps trained further"),
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bipe_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, source) in _INCOMING.items():
        command = commands.add_parser(name, help=f"{source} -> a checkpoint of ours")
        command.add_argument("source", help=f"{source}: a directory with config.json and tensors")
        command.add_argument("destination", help="a workdir without checkpoints")
        command.add_argument("--tokenizer", default="", help="a SentencePiece file (the source's)")
    command = commands.add_parser("to-hf", help="a checkpoint of ours -> for transformers")
    command.add_argument("source", help="a workdir (its latest checkpoint) or one step's directory")
    command.add_argument("destination", help="a directory that does not exist, or is empty")
    args = parser.parse_args()
    cli.quiet()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    if args.command == "to-hf":
        to_hf.convert(args.source, args.destination)
    else:
        incoming.convert(args.source, args.destination, _INCOMING[args.command][0], args.tokenizer)


if __name__ == "__main__":
    with cli.user_errors():
        main()
