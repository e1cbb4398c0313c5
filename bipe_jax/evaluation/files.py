"""The files that evaluations leave in a directory."""

import json
import os

from bipe_jax import plot, report
from bipe_jax.errors import UserError


def make_output(directory: str) -> None:
    """Makes the directory, if it is not there. Raises UserError if it cannot be made."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={directory} cannot be made: {error.strerror}") from None


def write_json(result: dict, path: str) -> None:
    """Writes a file of JSON, all of it or nothing."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1, allow_nan=False)
    os.replace(path + ".tmp", path)


def write(result: dict, directory: str) -> None:
    """Writes evaluation.json, extrapolation.png and report.html.

    Args:
      result: of `evaluator.evaluate`.
    """
    write_json(result, os.path.join(directory, "evaluation.json"))
    plot.draw([result], os.path.join(directory, "extrapolation.png"))
    report.write([directory], os.path.join(directory, "report.html"))
