"""Games of chess that are played by PyPI's `chess` from a seed: pairs of moves within games.

The players are blind beyond the next move: among the legal moves they prefer captures, by what is captured,
checks, castling and promotions to a queen. A move is the square that it begins at, the square that it ends
at, and at a promotion the letter of the piece, as in UCI's notation with spaces: "e2 e4 e7 e5 ... b7 a8 q".
"""

import importlib.util
import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bipe_jax.data.quickstart import is_held_out
from bipe_jax.errors import UserError
from bipe_jax.modalities.documents import Document, Options
from bipe_jax.modalities.place import Place

if TYPE_CHECKING:
    import chess

PROMOTIONS = ("q", "r", "b", "n")
SQUARES = tuple(f"{file}{rank}" for rank in range(1, 9) for file in "abcdefgh")
WORDS = (*SQUARES, *PROMOTIONS)
SET = "chess"
COUNT, PLIES = 2000, 60  # by default
_MOST_PLIES = 400
_QUIET_PLIES = 100  # without a capture or a pawn's move, after which a game ends
_VALUES = (0, 1, 3, 3, 5, 9, 0)  # of no piece, pawn, knight, bishop, rook, queen, king


def documents(options: Options) -> Iterator[Document]:
    """Yields games. Those that are not held out end after `plies`. Raises UserError: chess is missing."""
    for number in range(options.count or COUNT):
        name = f"game {options.seed} {number}"
        most = _MOST_PLIES if is_held_out(name) else options.plies or PLIES
        yield document(name, play(random.Random(name), most))


def check_installed() -> None:
    """Raises UserError if the package chess is not installed."""
    if importlib.util.find_spec("chess") is None:
        raise UserError("games are played by the package chess: pip install chess")


def play(draws: random.Random, most: int) -> list[str]:
    """The moves of a game of at most so many plies, in UCI's notation. Raises UserError."""
    check_installed()
    import chess

    board = chess.Board()
    while len(board.move_stack) < most:
        moves = list(board.legal_moves)
        quiet = board.halfmove_clock >= _QUIET_PLIES or board.is_insufficient_material()
        if not moves or quiet:
            break
        board.push(draws.choices(moves, [_weight(board, move) for move in moves])[0])
    return [move.uci() for move in board.move_stack]


def _weight(board: "chess.Board", move: "chess.Move") -> float:
    """How often a move is chosen, relative to a quiet one."""
    captured = board.piece_type_at(move.to_square) or 0
    return (
        1
        + 2 * _VALUES[captured]
        + 2 * board.gives_check(move)
        + 10 * board.is_castling(move)
        + 20 * (move.promotion is not None and _VALUES[move.promotion] == max(_VALUES))
    )


def words(move: str) -> list[str]:
    """The words of a move in UCI's notation: "b7a8q" -> ["b7", "a8", "q"]."""
    return [word for word in (move[:2], move[2:4], move[4:]) if word]


def document(name: str, moves: list[str]) -> Document:
    """A game as text, whose segments begin with White's moves."""
    begins, parts, at = [], [], 0
    for ply, move in enumerate(moves):
        if ply % 2 == 0:
            begins.append(at)
        parts.append(" ".join(words(move)))
        at += len(parts[-1]) + 1
    return Document(name, " ".join(parts), SET, (begins,))


def places(text: str) -> Iterator[Place]:
    """The squares of a game's moves, with those that are legal there, by the number of the ply from 1.

    A move begins where a piece stands that can move and ends, given where it begins, where that piece can go:
    measures of Toshniwal et al. 2022, "Chess as a Testbed for Language Model State Tracking".

    Raises:
      UserError: chess is missing, or the text is no game.
    """
    check_installed()
    import chess

    board, at = chess.Board(), 0
    moves = re.finditer(r"([a-h][1-8]) ([a-h][1-8])(?: ([qrbn])\b)?(?: |$)", text)
    for ply, found in enumerate(moves, 1):
        if found.start() != at:
            break
        begins, legal = found[1], [move.uci() for move in board.legal_moves]
        firsts = frozenset(move[:2] for move in legal)
        seconds = frozenset(move[2:4] for move in legal if move[:2] == begins)
        yield Place("legal piece", ply, *found.span(1), firsts)
        yield Place("legal move", ply, *found.span(2), seconds)
        move = "".join(filter(None, found.groups()))
        if move not in legal:
            break
        board.push_uci(move)
        at = found.end()
    if at != len(text):
        raise UserError(f"no game of chess: {text[at : at + 20]!r} is no legal move")
