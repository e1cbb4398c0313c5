"""All experiments by name."""

from bipe_jax.errors import UserError
from bipe_jax.experiments import (
    arithmetic,
    bi_nfa,
    extension,
    length,
    modalities,
    normal_length,
    retrieval,
    retrieval_text,
    scrolls,
    table,
)
from bipe_jax.experiments.experiment import Experiment
from bipe_jax.experiments.table import Table
from bipe_jax.suggest import did_you_mean

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        *bi_nfa.EXPERIMENTS,
        arithmetic.ARITHMETIC,
        arithmetic.FOLD,
        *retrieval.EXPERIMENTS,
        *retrieval_text.EXPERIMENTS,
        scrolls.SCROLLS,
        *length.EXPERIMENTS,
        extension.EXTENSION,
        normal_length.NORMAL_LENGTH,
        *modalities.EXPERIMENTS,
    )
}


ALL: dict[str, Experiment | Table] = {**EXPERIMENTS, table.TABLE.name: table.TABLE}


def find(name: str) -> Experiment | Table:
    """The experiment, or the table, of a name. Raises UserError."""
    if name not in ALL:
        raise UserError(
            f"there is no experiment {name!r}{did_you_mean(name, ALL)}: use list, or one of "
            f"{', '.join(ALL)}"
        )
    return ALL[name]
