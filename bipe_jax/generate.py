"""Continues a text with a checkpoint, token by token.

python -m bipe_jax.generate --checkpoint=runs/quickstart --prompt='ROMEO: ' [--temperature=0.8]

Prints the prompt and its continuation, until --max_new_tokens or the model begins a new document.
"""

import itertools
from collections.abc import Iterator

from bipe_jax import cli, commands, processes, segments
from bipe_jax.data import marked
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, loaded
from bipe_jax.evaluation.sampling import Sampling, check_sampling


def generate(
    path: str,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    extend: str = "",
) -> Iterator[str]:
    """Yields pieces of the text that follows a prompt.

    Args:
      path: a checkpoint, see `checkpoint.load`. extend: see `positions.extend`.

    Raises:
      UserError: the prompt is not UTF-8; and as `checkpoint.load`, `segments.segmenters_of_text` and
        `decode.Generator.stream`.
    """
    check_sampling(sampling)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8: the tokenizer reads nothing else") from None
    loaded_model = loaded.load(path, extend)
    tokenizer = loaded_model.tokenizer
    names = segments.segmenters_of_text(loaded_model.config)
    tokens = tokenizer.encode(prompt)
    generator = decode.Generator(loaded_model, len(tokens) + max(max_new_tokens, 1))
    so_far = tokens.tolist()
    text = printed = tokenizer.decode(tokens)
    for (token,) in generator.stream(
        [tokens],
        max_new_tokens,
        sampling=sampling,
        stop=tokenizer.ends,
        seed=seed,
        starts=[marked.starts_of(tokenizer, prompt, names)],
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
    args = commands.parser("generate").parse_args()
    cli.set_up()
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
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
