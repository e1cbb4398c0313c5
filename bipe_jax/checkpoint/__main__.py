"""Verifies checkpoints: compares their files with the checksums, and restores all arrays.

python -m bipe_jax.checkpoint verify runs/quickstart
"""

from bipe_jax import cli, commands
from bipe_jax.checkpoint import checksums
from bipe_jax.checkpoint.reading import check_restorable, locate, steps
from bipe_jax.errors import UserError


def main():
    args = commands.parser("checkpoint").parse_args()
    cli.quiet()
    directory, step = locate(args.path)
    numbers = steps(directory) if step is None else [step]
    if not numbers:
        raise UserError(f"checkpoint {args.path}: no complete checkpoint in {directory}")
    damaged = []
    for number in numbers:
        problems = checksums.verify(directory / str(number))
        note = f", without {checksums.NAME}" if problems is None else ""
        if not problems:
            try:
                check_restorable(directory, number)
            except UserError as error:
                problems = [str(error)]
        print(f"step {number}: {'damaged' if problems else 'intact'}{note}")
        damaged += [number] * bool(problems)
        for line in problems or ():
            print(f"  {line}")
    if damaged:
        raise UserError(f"{directory}: {len(damaged)} of {len(numbers)} checkpoints are damaged")


if __name__ == "__main__":
    with cli.user_errors():
        main()
