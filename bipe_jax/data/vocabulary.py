"""Which tokenizer a run has: the checkpoint's, a file's, or one trained on the run's own text."""

import itertools
import logging
import os
from collections.abc import Iterator

from etils import epath

from bipe_jax.config.spec import PREPARED
from bipe_jax.data import sources
from bipe_jax.data.tokenizer import Tokenizer, load, train
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger(__name__)


def choose(config: Plan, workdir: str, saved: Tokenizer | None) -> Tokenizer:
    """The checkpoint's tokenizer, else the config's, else one trained on the run's own text.

    One that is trained is kept as WORKDIR/tokenizer.model.

    Args:
      saved: the tokenizer of the checkpoint that the run goes on or starts from, if it does.

    Raises:
      UserError: it cannot be read or trained, or does not fit the checkpoint or the config.
    """
    given = config.tokenizer.path or _prepared_with(config)
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


def _prepared_with(config: Plan) -> str:
    """The tokenizer file that goes with prepared data, "" for other sources."""
    source = config.training.sources[0]
    if source.kind != PREPARED:
        return ""
    path = epath.Path(source.path) / "tokenizer.model"
    if not path.exists():
        raise UserError(
            f"config.data.train: {source.path} is no prepared directory (it has no tokenizer.model): "
            "python -m bipe_jax.data.prepare writes one"
        )
    return str(path)


def _sample_texts(config: Plan, size: int) -> Iterator[str]:
    """The beginnings of documents, of equal length as far as they reach, about `size` bytes in all.

    Takes the first documents of the corpus, up to 2000 or 50 times as much text as is needed.
    """
    held, characters = [], 0
    read = [
        sources.documents(source, config.data.sets, sources.policy_of(config))
        for source in config.training.sources
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
