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
from bipe_jax.workdir import json_files, outputs

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
    if "://" not in str(destination):
        outputs.check_new(destination)
    where = files.path_in(source, "config.json")
    config = format.config_of(json_files.read(where), where)
    spm = _tokenizer(config, source, tokenizer_path)
    config = _with_rule(config, spm)
    tensors = files.Tensors(source, format.MOST_ROWS)
    config = _without_rows_of_no_piece(config, tensors, spm)
    mapping.check(config, tensors.shapes, source, format.IGNORED)
    params = mapping.from_llama(config, tensors.shapes, tensors.read, source)
    checkpoint.save_model(destination, config, params, spm)
    _LOG.info(f"Wrote {epath.Path(destination)}/checkpoints/0")


def _tokenizer(config: Plan, source: str, path: str) -> tokenizer.Tokenizer:
    if not path:
        path = files.path_in(source, "tokenizer.model")
        if not os.path.exists(path):
            reason = "does not exist"
            if os.path.exists(os.path.join(source, "tokenizer.json")):
                reason += (
                    ", and a tokenizer.json may be of another kind than SentencePiece (byte-level BPE "
                    "as Llama 3's), which this project does not read"
                )
            raise UserError(f"{path} {reason}: give a SentencePiece file, --tokenizer=FILE")
    spm = tokenizer.load(path)
    if not spm.vocab_size <= config.model.vocab_size <= _most_ids(spm.vocab_size):
        raise _other_tokenizer(spm, config.model.vocab_size)
    return spm


def _most_ids(pieces: int) -> int:
    """The largest number of token ids of a model with so many pieces; with more they are another's."""
    return pieces + max(128, pieces // 8)


def _other_tokenizer(spm: tokenizer.Tokenizer, ids: int) -> UserError:
    return UserError(
        f"the tokenizer {spm.name} has {spm.vocab_size} pieces, but the model's vocab_size is {ids}: "
        "give the one that it was trained with, --tokenizer=FILE"
    )


def _without_rows_of_no_piece(
    config: Plan, tensors: files.Tensors, spm: tokenizer.Tokenizer
) -> Plan:
    """The config of as many token ids as the tokenizer has pieces; the tensors lose further rows.

    Rows after those of the pieces are padding, or of tokens that were added to the tokenizer, such as
    <pad>. No text has such a token, so that it is neither read nor a target. Without its logit the
    probability of each other token is the one under the condition that the token has a piece, and nothing
    that samples can produce it.
    """
    pieces = spm.vocab_size
    rows = {
        name: shape[0]
        for name in (mapping.EMBEDDING, mapping.OUTPUT)
        if (shape := tensors.shapes.get(name))
    }
    ids = rows.get(mapping.EMBEDDING, 0)
    if ids == pieces < config.model.vocab_size:
        raise _other_tokenizer(spm, config.model.vocab_size)
    if not pieces < ids <= _most_ids(pieces):
        return config  # `mapping.check` compares the shapes
    for name in (name for name in rows if rows[name] == ids):
        tensors.limit(name, pieces)
    _LOG.info(
        f"Note: the model has {ids:,} token ids and the tokenizer {pieces:,} pieces: the ids from "
        f"{pieces:,} on, padding or added tokens, are left out, since no text has them"
    )
    return config.replace({"model.vocab_size": pieces})


def _with_rule(config: Plan, spm: tokenizer.Tokenizer) -> Plan:
    """The config with this tokenizer's rule; warns if it differs from a rule that the format fixes."""
    pieces, name = spm.pieces(), config.segments.rule
    if config.rule is None:
        return config.with_rule(segments.rule_of(config, pieces, spm.bos_id))
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
