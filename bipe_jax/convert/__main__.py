"""Converts checkpoints from and to other projects.

python -m bipe_jax.convert from-authors SRC DST   a checkpoint of BiPE's authors -> a checkpoint of ours
python -m bipe_jax.convert from-llama SRC DST     a Llama checkpoint of Hugging Face's -> one of ours
python -m bipe_jax.convert from-hf SRC DST        the output of to-hf -> a checkpoint of ours, the same again
python -m bipe_jax.convert to-hf CHECKPOINT DST   a checkpoint of ours -> a directory for transformers
"""

import jax

from bipe_jax import cli, commands
from bipe_jax.convert import authors, from_hf, incoming, llama, to_hf

# Command -> the module of the source's format.
_INCOMING = {"from-authors": authors, "from-llama": llama, "from-hf": from_hf}


def main():
    args = commands.parser("convert").parse_args()
    cli.quiet()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    if args.command == "to-hf":
        to_hf.convert(args.source, args.destination)
    else:
        incoming.convert(args.source, args.destination, _INCOMING[args.command], args.tokenizer)


if __name__ == "__main__":
    with cli.user_errors():
        main()
