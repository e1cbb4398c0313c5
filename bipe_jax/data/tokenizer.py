"""SentencePiece tokenizers: loaded from a file, or trained on the run's own text."""

import io
import itertools
import logging
import os
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece as spm
from etils import epath

from bipe_jax.data import sources
from bipe_jax.data.batches import mixture, prepared_with
from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger(__name__)

# SentencePiece leaves out longer "sentences"; text is cut into pieces of at most so many bytes.
_SAMPLE_BYTES = 4000


class Tokenizer:
    """A SentencePiece model and what the project asks of it.

    Attributes:
      model: the bytes of the `.model` file.
      name: where it came from, for error messages.
      vocab_size: number of ids.
      bos_id: id put before each document, or -1 if the model has none.
      ends: ids that end a document when they are generated: of the next one's beginning, and of an end.
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
        self.bos_id = self._processor.bos_id()
        self.ends = frozenset({self.bos_id, self._processor.eos_id()} - {-1})

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one document, BOS first where the model has one: (L,) int32."""
        return self.encode_parts([text], [True])[0]

    def encode_parts(self, texts: list[str], firsts: list[bool]) -> list[np.ndarray]:
        """The same for parts of documents: BOS comes before those that are the first of theirs.

        Other threads run meanwhile.
        """
        encoded = self._processor.encode(texts, return_type="numpy", num_threads=1)
        bos = [self.bos_id] if self.bos_id >= 0 else []
        return [
            np.concatenate([bos if first else [], ids]).astype(np.int32)
            for first, ids in zip(firsts, encoded, strict=True)
        ]

    def decode(self, ids) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        """The text each id stands for, with plain spaces; "" for control tokens and lone bytes."""
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
        """UTF-8 bytes of text that each id stands for, (V,) int32; 0 for control tokens.

        Over a document they add up to the text's bytes, and one more for models that put a space in
        front (Llama's).
        """
        return np.asarray(
            [
                1 if self._processor.is_byte(i) else len(piece.encode())
                for i, piece in enumerate(self.pieces())
            ],
            np.int32,
        )


def load(path: str) -> Tokenizer:
    """Reads a SentencePiece `.model`, local or (with the extra `gcs` or `s3`) remote.

    Raises:
      UserError: it cannot be read, or is not a SentencePiece model.
    """
    try:
        model = epath.Path(path).read_bytes()
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"tokenizer.path={path!r} cannot be read: {reason}") from None
    return Tokenizer(model, f"tokenizer.path={path!r}")


def _samples(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Cuts texts into samples of whole lines, where lines are short enough, up to `max_bytes`."""
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

    The text is kept as it is (no normalisation, no whitespace removed), and a newline is a piece of
    its own, so that lines are segments.

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
            num_threads=16,  # fixed: the model must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot train a tokenizer with model.vocab_size={vocab_size}: {str(error).splitlines()[-1]}"
        ) from None
    return Tokenizer(model.getvalue())


def choose(config, workdir: str, saved: Tokenizer | None) -> Tokenizer:
    """The checkpoint's tokenizer, else the config's, else one trained on the run's own text.

    One that is trained is kept as WORKDIR/tokenizer.model.

    Args:
      saved: the tokenizer of the checkpoint that the run goes on or starts from, if it does.

    Raises:
      UserError: it cannot be read or trained, or does not fit the checkpoint or the config.
    """
    given = config.tokenizer.path or prepared_with(config)
    path = given or Workdir(workdir).tokenizer
    if given:
        chosen = load(path)
        if saved and chosen.pieces() != saved.pieces():
            raise UserError(
                f"the tokenizer {path!r} has another vocabulary than the checkpoint's, "
                f"{saved.name}: leave config.tokenizer.path out and train on text or on data prepared "
                "with that one, or start a run without that checkpoint"
            )
    elif saved:
        chosen = saved
    elif os.path.exists(path):
        chosen = load(path)
    else:
        _LOG.info(
            f"Training a tokenizer of {config.model.vocab_size} pieces on {config.data.train}"
        )
        size = config.tokenizer.train_bytes
        chosen = train(_sample_texts(config, size), config.model.vocab_size, size)
        with files.replacing(path, "wb") as file:
            file.write(chosen.model)
    if chosen.vocab_size != config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size}, but the tokenizer {path} has "
            f"{chosen.vocab_size} pieces: set config.model.vocab_size to that"
        )
    return chosen


def _sample_texts(config, size: int) -> Iterator[str]:
    """The beginnings of documents, of equal length as far as they reach, about `size` bytes in all.

    Takes the first documents of the corpus, up to 2000 or 50 times as much text as is needed.
    """
    held, characters = [], 0
    read = [
        sources.documents(spec, tuple(config.data.sets), sources.policy_of(config))
        for spec, _ in mixture(config)
    ]
    for document in itertools.chain.from_iterable(itertools.zip_longest(*read)):
        if document is None:
            continue
        held.append(document["text"][:size])
        characters += len(held[-1])
        if len(held) == 2000 or characters > 50 * size:
            break
    # The largest equal share that does not exceed `size`: short documents leave more to long ones.
    share, left = 0, size
    for i, length in enumerate(sorted(map(len, held))):
        share = max(left // (len(held) - i), 1)
        left -= min(length, share)
    return (text[:share] for text in held)
