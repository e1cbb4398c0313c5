"""What the sources of this package yield."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Document(NamedTuple):
    """A text with its segments.

    Attributes:
      name: by which it is held out or not. text: of the document. set: its `pile_set_name`.
      segments: for each level, the finest first, the ascending character offsets where segments begin; () of
        a text without natural segments.
    """

    name: str
    text: str
    set: str
    segments: Sequence[Sequence[int]] = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen of a data set; 0 and "" are the data set's defaults.

    Attributes:
      count: number of proofs, from the start of the database, of games, or of DNA sequences.
      seed: of what is computed.
      references: "absolute" or "relative", of proofs.
      plies: half-moves that a game of the training part has at most.
    """

    count: int = 0
    seed: int = 0
    references: str = ""
    plies: int = 0
