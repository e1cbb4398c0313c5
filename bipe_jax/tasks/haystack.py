"""Haystacks: text that facts are hidden in."""

import dataclasses
from collections.abc import Sequence

from bipe_jax.config.spec import parse_source
from bipe_jax.data import sources
from bipe_jax.errors import UserError

# The sentences that Mohtashami & Jaggi (2023, appendix) repeat.
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NOISE_NAME = "noise"
_READ = 4_000_000  # characters of a source, unless the longest prompt needs more


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Text that facts are put into.

    Attributes:
      name: "noise", or the source.
      units: sentences or lines, each with the space or newline after it. Facts are put between them.
    """

    name: str
    units: Sequence[str]

    def take(self, first: int, size: int) -> list[str]:
        """`size` characters of units from `first` on, repeated as needed, the last one cut."""
        taken = []
        while size > 0:
            unit = self.units[first % len(self.units)]
            taken.append(unit[:size])
            size -= len(unit)
            first += 1
        return taken


def noise() -> Haystack:
    """The sentences of the passkey paper."""
    return Haystack(NOISE_NAME, [f"{sentence} " for sentence in NOISE])


def of_source(spec: str, longest: int, policy: sources.Policy | None = None) -> Haystack:
    """The lines of a source's first documents.

    Args:
      spec: a source, see `config.spec`.
      longest: tokens of the longest prompt.

    Raises:
      UserError: the source cannot be read, or has no text.
    """
    units, left = [], max(_READ, 8 * longest)
    for document in sources.documents(parse_source(spec), policy=policy):
        lines = document["text"][:left].splitlines()
        units += [f"{line}\n" for line in lines]
        left -= sum(len(line) + 1 for line in lines)
        if left <= 0:
            break
    if not any(unit.strip() for unit in units):
        raise UserError(f"--haystack={spec} has no text: use another source")
    return Haystack(spec, units)
