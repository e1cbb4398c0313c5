"""A checkpoint of another project -> a workdir with one checkpoint of ours, step 0."""

import logging
import os
from typing import Any

from etils import epath

from bipe_jax import checkpoint, segments
from bipe_jax.convert import files, mapping
from bipe_jax.data import tokenizer
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import json_files

_LOG = logging.getLogger(__name__)


def convert(source: str, destination: str, format: Any, tokenizer_path: str = "") -> None:
    """Writes DESTINATION/checkpoints/0, without optimizer state.

    The config, the tokenizer and the tensors' names and shapes are checked before tensors are read.

    Args:
      source: a local directory with config.json, the tensors and perhaps tokenizer.model.
      destination: a workdir without checkpoints.
      format: the module of the source's format: `authors`, `from_hf` or `llama`.
      tokenizer_path: a SentencePiece file; "": the source's.

    Raises:
      UserError: the source or the tokenizer cannot be converted. Nothing was written.
    """
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such directory")
    checkpoint.check_free(destination)
    where = os.path.join(source, "config.json")
    config = format.config_of(json_files.read(where), where)
    spm = _tokenizer(config, source, tokenizer_path)
    config = _with_rule(config, spm)
    tensors = files.Tensors(source, format.MOST_ROWS)
    mapping.check(config, tensors.shapes, source, format.IGNORED)
    params = mapping.from_llama(config, tensors.shapes, tensors.read, source)
    checkpoint.save_model(destination, config, params, spm)
    _LOG.info(f"Wrote {epath.Path(destination)}/checkpoints/0")


def _tokenizer(config: Plan, source: str, path: str) -> tokenizer.Tokenizer:
    if not path:
        path = os.path.join(source, "tokenizer.model")
        if not os.path.exists(path):
            reason = "does not exist"
            if os.path.exists(os.path.join(source, "tokenizer.json")):
                reason += (
                    ", and a tokenizer.json may be of another kind than SentencePiece (byte-level BPE "
                    "as Llama 3's), which this project does not read"
                )
            raise UserError(f"{path} {reason}: give a SentencePiece file, --tokenizer=FILE")
    spm = tokenizer.load(path)
    if spm.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {spm.vocab_size} pieces, but the model's vocab_size is "
            f"{config.model.vocab_size}: give the one that it was trained with, --tokenizer=FILE"
        )
    return spm


def _with_rule(config: Plan, spm: tokenizer.Tokenizer) -> Plan:
    """The config with this tokenizer's rule; warns if it differs from a rule that the format fixes."""
    pieces, name = spm.pieces(), config.segments.rule
    if config.rule is None:
        return config.with_rule(segments.resolve(name, pieces))
    fixed = config.rule.separators
    try:
        own = segments.resolve(name, pieces).separators
    except UserError:
        own = ()
    if own != fixed:
        shown = ", ".join(f"{i} ({pieces[i]!r})" for i in fixed if i < len(pieces))
        _LOG.info(
            f"Note: segments end at the ids {fixed} as in the source's code; with this tokenizer those "
            f"are {shown or 'none'}, while the rule {name!r} would be {own}"
        )
    return config
