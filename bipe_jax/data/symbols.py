"""Tokenizers of given words: "symbols:WORD WORD ..." as `tokenizer.path`.

They are SentencePiece models of the type WORD: a text is words between spaces, and each word is one token.
They are saved, exported and read as any other.

A model is a message of Protocol Buffers, `sentencepiece_model.proto`. It is written and read here by its wire
format: the classes that SentencePiece brings for it load only beside the newest protobuf.
"""

import struct
from collections.abc import Iterator

from bipe_jax.config import spec
from bipe_jax.errors import UserError

PREFIX = spec.WORDS
CONTROL = ("<unk>", "<s>", "</s>")  # the first ids: of unknown words, BOS and EOS
_SPACE = "\u2581"

# Numbers of fields, and values of enumerations.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _IDS = 3, 4, (40, 41, 42, 43)  # those of <unk>, BOS, EOS and padding
_WORD = 3  # a type of models
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # types of pieces


def is_model(model: bytes) -> bool:
    """Whether a SentencePiece model is one of given words."""
    trainer = next((value for number, value in _fields(model) if number == _TRAINER), b"")
    return isinstance(trainer, bytes) and (_MODEL_TYPE, _WORD) in _fields(trainer)


def model(text: str) -> bytes:
    """The SentencePiece model of "symbols:WORD WORD ...", whose ids follow those of CONTROL.

    Raises:
      UserError: there is no word, or one occurs twice or is a control token.
    """
    words = text.removeprefix(PREFIX).split()
    twice = next((word for word in words if words.count(word) > 1 or word in CONTROL), None)
    if not words or twice:
        problem = f"has the word {twice!r} twice" if twice else "has no words"
        raise UserError(f"tokenizer.path={text!r} {problem}: use, for example, 'symbols:a b c'")
    pieces = [*zip(CONTROL, (_UNKNOWN, _CONTROL, _CONTROL), strict=True)]
    pieces += [(_SPACE + word, _NORMAL) for word in words]
    parts = [_field(_PIECES, _piece(piece, kind)) for piece, kind in pieces]
    trainer = _field(_MODEL_TYPE, _WORD) + _field(_VOCAB_SIZE, len(pieces))
    trainer += b"".join(map(_field, _IDS, (0, 1, 2, -1)))
    # Its name; a space before the text, one between words, and both as "▁".
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 1) + _field(5, 1)
    return b"".join([*parts, _field(_TRAINER, trainer), _field(_NORMALIZER, normalizer)])


def _piece(piece: str, kind: int) -> bytes:
    score = bytes([2 << 3 | 5]) + struct.pack("<f", 0.0)
    return _field(1, piece.encode()) + score + _field(3, kind)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """A number in groups of 7 bits, the lowest first."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the numbers and values of a message's fields; what is no message has none after the fault."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise IndexError

    try:
        while at < len(message):
            number, kind = divmod(varint(), 8)
            if kind == 0:
                yield number, varint()
                continue
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield number, message[at : at + size]
            at += size
    except (IndexError, KeyError):
        return
