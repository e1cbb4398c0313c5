"""The choice of a run's tokenizer: the checkpoint's, a file's, or one trained on the run's text."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence

from etils import epath

from bipe_jax import synthetic
from bipe_jax.config.spec import PREPARED, SYNTHETIC, Source
from bipe_jax.data import sources, symbols
from bipe_jax.data.tokenizer import Tokenizer, load, train
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger(__name__)

_SAMPLED, _SAMPLED_CHARACTERS = 64, 16384  # documents of a source, and characters of each
_SEARCHED = 10_000  # documents of a source in which those are sought


def choose(config: Plan, workdir: str, saved: Tokenizer | None) -> Tokenizer:
    """The tokenizer of the config or prepared data, else the checkpoint's, else a newly trained one.

    The trained tokenizer is saved as WORKDIR/tokenizer.model.

    Args:
      config, workdir: of the run.
      saved: the tokenizer of the checkpoint that the run resumes or starts from, if any.

    Raises:
      UserError: it cannot be read or trained, or does not match the checkpoint or the config.
    """
    configured = config.tokenizer.path or _path_in_prepared(config) or _words_of_tasks(config)
    path = configured or Workdir(workdir).tokenizer
    if configured:
        chosen = load(path)
        # The same pieces with other scores, or another normaliser, would give other tokens.
        if saved and chosen.model != saved.model:
            raise UserError(
                f"the tokenizer {path!r} is another one than the checkpoint's, {saved.name}: leave "
                "config.tokenizer.path out and train on text or on data prepared with that one, or start "
                "a run without that checkpoint"
            )
    elif saved:
        chosen = saved
    elif files.exists(path):
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


def remarks(config: Plan, tokens: Tokenizer) -> list[str]:
    """As `remarks_on`, of a run's text, or of that of its evaluation if it has none."""
    read = [source for source in config.training.sources if source.kind != PREPARED]
    read = read or [source for source in config.evaluated if source.kind != PREPARED]
    return remarks_on(tokens, read, config.data.sets, sources.policy_of(config))


def remarks_on(
    tokens: Tokenizer, read: Sequence[Source], sets: Sequence[str], policy: sources.Policy
) -> list[str]:
    """What a user should know of a tokenizer: what separates documents, and how much text it replaces.

    Args:
      read: sources of text, of which the first documents are read. sets, policy: see `sources.open_source`.
    """
    lines = []
    if tokens.bos_id < 0:
        lines.append("The tokenizer has neither BOS nor EOS: nothing separates documents")
    elif tokens.bos_id == tokens.eos_id:
        lines.append("The tokenizer has no BOS: each document begins with EOS")
    total = replaced = 0
    for text in itertools.chain.from_iterable(_first_texts(s, sets, policy) for s in read):
        total += len(text.encode())
        replaced += tokens.replaced_bytes(text)
    if replaced:
        lines.append(
            f"The tokenizer replaces {replaced / total:.2%} of the text (by <unk>, or by a normaliser), by "
            f"{total:,} bytes of it"
        )
    return lines


def _first_texts(source: Source, sets: Sequence[str], policy: sources.Policy) -> Iterator[str]:
    """The beginnings of a source's first documents of the sets; none of those that come very late."""
    everything = sources.documents(dataclasses.replace(source, sets=()), (), policy)
    documents = (
        document
        for document in itertools.islice(everything, _SEARCHED)
        if all(not chosen or document["set"] in chosen for chosen in (sets, source.sets))
    )
    for document in itertools.islice(documents, _SAMPLED):
        yield document["text"][:_SAMPLED_CHARACTERS]


def _path_in_prepared(config: Plan) -> str:
    """The tokenizer file of prepared data, "" for other sources."""
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


def _words_of_tasks(config: Plan) -> str:
    """The tokenizer of the words of synthetic tasks; "" where there is other text."""
    words: dict[str, None] = {}
    for source in config.training.sources:
        if source.kind != SYNTHETIC:
            return ""
        words |= dict.fromkeys(synthetic.parse(source.path).words)
    return symbols.PREFIX + " ".join(words)


def _sample_texts(config: Plan, size: int) -> Iterator[str]:
    """The beginnings of documents, equally long where they are long enough, of at least `size` bytes in all.

    They are the first documents of all sources: as many as have `size` bytes, and at least 2000 unless
    fewer have 50 times `size` characters.
    """
    texts, characters, total = [], 0, 0
    by_source = [
        sources.documents(source, config.data.sets, sources.policy_of(config))
        for source in config.training.sources
    ]
    for document in itertools.chain.from_iterable(itertools.zip_longest(*by_source)):
        if document is None:
            continue
        texts.append(document["text"][:size])
        characters += len(texts[-1])
        total += len(texts[-1].encode())
        if (len(texts) >= 2000 and total >= size) or characters > 50 * size:
            break
    # The largest equal share whose sum is at most `size`: short documents leave more to long ones.
    share, left = 0, size
    for i, length in enumerate(sorted(map(len, texts))):
        share = max(left // (len(texts) - i), 1)
        left -= min(length, share)
    return (text[:share] for text in texts)
