"""The config.json that `to_hf` wrote -> our config, which it contains."""

from bipe_jax import checkpoint
from bipe_jax.convert import llama
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan

IGNORED = llama.IGNORED
MOST_ROWS: dict[str, int] = {}


def config_of(theirs: dict, where: str) -> Plan:
    """Our config of a directory that `to_hf` wrote.

    Args:
      theirs: the contents of config.json.
      where: its path, for errors.

    Raises:
      UserError: the directory was not written by `to_hf`.
    """
    ours = theirs.get("bipe_jax")
    if isinstance(ours, dict):
        try:
            return checkpoint.plan_from_json(ours)
        except UserError as error:
            raise UserError(f"{where}, key 'bipe_jax': {error}") from None
    command = "from-llama" if theirs.get("model_type") == "llama" else "from-llama or from-authors"
    if "rpe_type" in theirs:
        command = "from-authors"
    raise UserError(
        f"{where} has no config of ours (key 'bipe_jax'), so to-hf did not write it: use {command}"
    )
