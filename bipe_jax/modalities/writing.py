"""JSONL shards of a data set: a training part and a held-out part, and a file that says what they are."""

import dataclasses
import json
import os
from typing import Any

from bipe_jax.data.quickstart import is_held_out
from bipe_jax.errors import UserError
from bipe_jax.modalities import registry
from bipe_jax.modalities.documents import Document, Options
from bipe_jax.workdir import outputs

SHARDS = 4  # of the training part
TRAIN, HELD_OUT = "train-*.jsonl", "held-out.jsonl"
DESCRIPTION = "data.json"


def write(name: str, options: Options, directory: str) -> dict[str, Any]:
    """Writes a data set into a directory.

    Args:
      name: in `registry.MODALITIES`.

    Returns:
      The content of data.json.

    Raises:
      UserError: what it is made from is not installed, it has no such option, no document is held out, or the
        directory cannot be written.
    """
    modality = registry.find(name)
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if value}
    for key in chosen:
        if key not in modality.options:
            known = ", ".join(f"--{one}" for one in modality.options) or "none"
            raise UserError(f"--{key} is no option of {name}: it has {known}")
    names = [f"train-{i:05}-of-{SHARDS:05}.jsonl" for i in range(SHARDS)]
    outputs.check_directory(directory, *names, HELD_OUT, DESCRIPTION)
    lines: dict[str, list[str]] = {one: [] for one in (*names, HELD_OUT)}
    characters = dict.fromkeys(lines, 0)
    trained = 0
    for document in modality.documents(options):
        shard = HELD_OUT if is_held_out(document.name) else names[trained % SHARDS]
        trained += shard != HELD_OUT
        lines[shard].append(_line(document))
        characters[shard] += len(document.text)
    if not lines[HELD_OUT] or trained < SHARDS:
        raise UserError(
            f"{name} has too few documents, of which one in ten is held out: use a larger --count"
        )
    for shard, of_shard in lines.items():
        outputs.write_bytes(os.path.join(directory, shard), "".join(of_shard).encode())
    description = {
        "data": name,
        "source": modality.source,
        "version": modality.version(),
        "licence": modality.licence,
        "levels": modality.levels,
        "options": chosen,
        "documents": {shard: len(of_shard) for shard, of_shard in lines.items()},
        "characters": characters,
    }
    outputs.write_json(os.path.join(directory, DESCRIPTION), description)
    return description


def _line(document: Document) -> str:
    record: dict[str, Any] = {"text": document.text, "meta": {"pile_set_name": document.set}}
    if document.segments:
        record["segments"] = document.segments
    return json.dumps(record) + "\n"
