"""SentencePiece tokenizers: loaded from a file, or trained on text."""

import functools
import io
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece as spm
from etils import epath

from bipe_jax.data import symbols
from bipe_jax.errors import UserError

# Largest piece that text is cut into: SentencePiece skips longer "sentences".
_SAMPLE_BYTES = 4000
_PART = 1 << 18  # characters: longer documents are tokenised in parts


def parts(text: str) -> Iterator[str]:
    """Cuts a long text into parts, after newlines where possible."""
    start = 0
    while len(text) - start > _PART:
        cut = text.find("\n", start + _PART - 1, start + 2 * _PART) + 1 or start + _PART
        yield text[start:cut]
        start = cut
    yield text[start:]


class Tokenizer:
    """A SentencePiece model.

    Attributes:
      model: the bytes of the `.model` file.
      name: its origin, for error messages.
      vocab_size: number of ids.
      bos_id: the id before each document: BOS, or EOS of a model without BOS; -1 if it has neither.
      eos_id: the id after the last token of a text, or -1 if the model has none.
      ends: ids that end a generated document: BOS (of the next document) and EOS.
      is_of_words: whether its pieces are given words, see `symbols`, and texts have no others.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """Raises UserError if `model` is not SentencePiece's."""
        self.model, self.name = model, name
        self._processor = spm.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name} is not a SentencePiece model: {error}") from None
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id, self.eos_id = bos if bos >= 0 else eos, eos
        self.ends = frozenset({bos, eos} - {-1})
        self.is_of_words = symbols.is_model(model)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one document, `bos_id` first where there is one: (L,) int32."""
        return self.encode_parts([text], [True])[0]

    def text_bytes(self, text: str, tokens: np.ndarray) -> np.ndarray:
        """The bytes of a text that each of its tokens stands for, (L,) int32.

        They sum up to those of the text, also where the model replaces text (<unk>, a normaliser).

        Args:
          text: that was encoded at once. tokens: of the text.
        """
        sizes, count = self._byte_lengths[tokens], len(tokens)
        if sizes.sum() == len(text.encode()):
            return sizes
        mapping = self._processor.encode(text, return_type="offset_mapping", return_bytes=True)
        starts = [start for start, _ in mapping["offsets"]]
        if not starts:  # all of the text is lost
            return np.full(count, len(text.encode()) // max(count, 1), np.int32)
        bounds = np.maximum.accumulate([0, *starts[1:], len(text.encode())])
        return np.pad(np.diff(bounds), (count - len(starts), 0)).astype(np.int32)

    def replaced_bytes(self, text: str) -> int:
        """The number of bytes of a text that are not those of its pieces: of <unk>, or normalised."""
        if self._processor.decode(self._processor.encode(text)) == text:
            return 0
        data = text.encode()
        mapping = self._processor.encode(text, return_type="offset_mapping", return_bytes=True)

        def is_kept(token: int, start: int, end: int) -> bool:
            piece, own = self._pieces[token].encode(), data[start:end]
            added_space = start == 0 and piece[:1] == b" " and own == piece[1:]
            return self._processor.is_byte(token) or own == piece or added_space

        tokens = zip(mapping["ids"], mapping["offsets"], strict=True)
        return len(data) - sum(end - start for i, (start, end) in tokens if is_kept(i, start, end))

    def encode_parts(self, texts: list[str], firsts: list[bool]) -> list[np.ndarray]:
        """Token ids of parts of documents, `bos_id` before the first part of each: (L,) int32 each.

        The call releases the interpreter's lock.
        """
        encoded = self._processor.encode(texts, return_type="numpy", num_threads=1)
        if self.is_of_words:
            self._check_words(texts, encoded)
        bos = [self.bos_id] if self.bos_id >= 0 else []
        return [
            np.concatenate([bos if first else [], ids]).astype(np.int32)
            for first, ids in zip(firsts, encoded, strict=True)
        ]

    def _check_words(self, texts: list[str], encoded: list[np.ndarray]) -> None:
        unknown = self._processor.unk_id()
        for text, ids in zip(texts, encoded, strict=True):
            if (ids == unknown).any():
                known = set(self.ids())
                word = next(word for word in text.split() if word not in known)
                raise UserError(f"{self.name} has no word {word!r}, which the data has: add it")

    @property
    def end_id(self) -> int:
        """The id after a completion: EOS, or BOS of a model without EOS. Raises UserError without either."""
        if not self.ends:
            raise UserError(f"{self.name} has neither EOS nor BOS, and one must end completions")
        return self.eos_id if self.eos_id >= 0 else self.bos_id

    def ids(self) -> dict[str, int]:
        """The ids of words, of a tokenizer of words."""
        return {piece.strip(): i for i, piece in enumerate(self._pieces) if piece}

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        """The text each id stands for, with plain spaces; "" for control tokens and lone bytes."""
        return self._pieces.copy()

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return [self._piece(i) for i in range(self.vocab_size)]

    def _piece(self, i: int) -> str:
        processor = self._processor
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return ""
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):  # "<0x0A>"
            byte = int(piece[3:5], 16)
            return chr(byte) if byte < 0x80 else ""
        return piece.replace("\u2581", " ")

    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of each id's text, (V,) int32; 0 for control tokens.

        Their sum over a document is the size of its text, plus 1 for models that prepend a space
        (Llama's).
        """
        return self._byte_lengths.copy()

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        sizes = [
            1 if self._processor.is_byte(i) else len(piece.encode())
            for i, piece in enumerate(self._pieces)
        ]
        return np.asarray(sizes, np.int32)


def load(path: str) -> Tokenizer:
    """Reads a SentencePiece `.model`, local or (with the extra `gcs` or `s3`) remote.

    Args:
      path: of the file, or "symbols:WORD WORD ..." for a tokenizer of these words.

    Raises:
      UserError: the file cannot be read, or is not a SentencePiece model.
    """
    if path.startswith(symbols.PREFIX):
        return Tokenizer(symbols.model(path), f"tokenizer.path={path!r}")
    try:
        model = epath.Path(path).read_bytes()
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"tokenizer.path={path!r} cannot be read: {reason}") from None
    return Tokenizer(model, f"tokenizer.path={path!r}")


def _samples(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Cuts texts into samples of whole lines, or of parts of long lines, up to `max_bytes` in all."""
    left = max_bytes
    for text in texts:
        sample, size = [], 0
        for line in text.splitlines(keepends=True):
            # A character is at most 4 bytes.
            for start in range(0, len(line), _SAMPLE_BYTES // 4):
                part = line[start : start + _SAMPLE_BYTES // 4]
                part_size = len(part.encode())
                if size + part_size > min(_SAMPLE_BYTES, left):
                    yield "".join(sample)
                    left -= size
                    sample, size = [], 0
                    if part_size > left:
                        return
                sample.append(part)
                size += part_size
        if sample:
            yield "".join(sample)
            left -= size


def train(texts: Iterable[str], vocab_size: int, max_bytes: int) -> Tokenizer:
    """Trains a unigram model with byte fallback on at most `max_bytes` of the texts.

    The text is not normalised. A newline is a piece of its own, so that lines can be segments.

    Raises:
      UserError: the text is too little for so large a vocabulary.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_samples(texts, max_bytes),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            num_threads=16,  # fixed, since the model depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot train a tokenizer with model.vocab_size={vocab_size}: {str(error).splitlines()[-1]}"
        ) from None
    return Tokenizer(model.getvalue())
