"""Continues a text with a checkpoint, token by token.

python -m bipe_jax.generate --checkpoint=runs/quickstart --prompt='ROMEO: ' [--temperature=0.8]

Prints the prompt and its continuation, until --max_new_tokens or the model begins a new document.
"""

import itertools
from collections.abc import Iterator

from bipe_jax import cli, processes
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, loaded


def generate(
    path: str,
    prompt: str,
    max_new_tokens: int,
    sampling: decode.Sampling,
    seed: int = 0,
    extend: str = "",
) -> Iterator[str]:
    """Yields pieces of the text that follows a prompt.

    Args:
      path: a checkpoint, see `checkpoint.load`. extend: see `positions.extend`.

    Raises:
      UserError: the prompt is not UTF-8; and as `checkpoint.load` and `decode.Generator.stream`.
    """
    decode.check_sampling(sampling)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8: the tokenizer reads nothing else") from None
    loaded_model = loaded.load(path, extend)
    tokenizer = loaded_model.tokenizer
    tokens = tokenizer.encode(prompt)
    generator = decode.Generator(loaded_model, len(tokens) + max(max_new_tokens, 1))
    so_far = tokens.tolist()
    text = printed = tokenizer.decode(tokens)
    for (token,) in generator.stream(
        [tokens], max_new_tokens, sampling=sampling, stop=tokenizer.ends, seed=seed
    ):
        so_far.append(token)
        text = tokenizer.decode(so_far)
        # A character of several byte tokens is complete with its last.
        if not text.endswith("\ufffd"):
            yield text[len(printed) :]
            printed = text
    if text != printed:  # an incomplete character
        yield text[len(printed) :]


def main():
    parser = cli.checkpoint_parser("bipe_jax.generate", __doc__)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="(128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most probable token (0)"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample from the k most probable tokens; 0: all (0)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the top tokens with this sum (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--extend", default="", help="scale the rotary encoding, such as ntk:8")
    args = parser.parse_args()
    cli.set_up()
    sampling = decode.Sampling(args.temperature, args.top_k, args.top_p)
    pieces = generate(
        args.checkpoint, args.prompt, args.max_new_tokens, sampling, args.seed, args.extend
    )
    first = next(pieces, "")  # errors come before any text
    for text in itertools.chain([args.prompt + first], pieces, ["\n"]):
        if processes.is_first():
            print(text, end="", flush=True)
            if cli.unread() and not processes.name():
                break
    cli.check_printed()


if __name__ == "__main__":
    with cli.user_errors():
        main()
