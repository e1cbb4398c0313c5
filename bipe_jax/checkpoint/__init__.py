"""Checkpoints: the directory of each step contains all that resuming, or using the model, needs.

WORKDIR/checkpoints/STEP/
  params/, optimizer/   arrays, nested dicts with stable names (Orbax)
  data/                 state of the training stream (JSON)
  config/               the config with its format, and the separators of its segment rule (JSON)
  tokenizer/            the SentencePiece model (JSON, base64)
  checksums.sha256      of these files

A converted model is step 0, without optimizer/, data/ and checksums (`save_model`).

python -m bipe_jax.checkpoint verify runs/quickstart    checks whether each checkpoint is intact
"""

from bipe_jax.checkpoint.models import check_free, save_model
from bipe_jax.checkpoint.reading import (
    Meta,
    describe,
    load,
    meta_to_json,
    plan_from_json,
    read_params,
    shards_from_json,
    shards_to_json,
    steps,
)
from bipe_jax.checkpoint.saving import Checkpoints

__all__ = [
    "Checkpoints", "Meta", "check_free", "describe", "load", "meta_to_json", "plan_from_json",
    "read_params", "save_model", "shards_from_json", "shards_to_json", "steps",
]  # fmt: skip
