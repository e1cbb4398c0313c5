"""Prints the reference of all config fields, docs/reference/config.md: python -m bipe_jax.config."""

import itertools

from bipe_jax import streams
from bipe_jax.config import FIELDS, Field, fields

_FIXES = {
    fields.FREE: "",
    fields.DATA: "data",
    fields.RUN: "run",
    fields.PARAMETERS: "run, parameters",
}

_HEAD = """\
# Config fields

Made from [`bipe_jax/config/fields.py`](../../bipe_jax/config/fields.py) by
`python -m bipe_jax.config > docs/reference/config.md`.

A config file is Python with a function `get_config()` that returns an `ml_collections.ConfigDict`, and
starts from `configs/base.py`. Each field can be set on the command line, as in
`--config.optimizer.learning_rate=3e-4`. The last column says what a field fixes: a run is resumed only with
the same values of the fields marked *run*, and with the same data, which may have been moved, of those marked
*data*; a new run that starts from another run's parameters
(`initial_checkpoint`) needs the same values of those marked *parameters*.
"""


def reference() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]

    def group(field: Field) -> str:
        return field.name.rpartition(".")[0]

    for name, rows in itertools.groupby(FIELDS.values(), group):
        lines += [f"## `{name}`\n" if name else "## Run\n"]
        lines += ["| field | default | meaning | fixes |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.name}`", f"`{row.default!r}`", row.meaning, _FIXES[row.fixes])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    streams.harden()
    print(reference(), end="")
