"""Compares two runs as they lie on disk: the loss curve, and all that the last checkpoint holds."""

import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from bipe_jax import checkpoint, cli
from bipe_jax.checkpoint import checksums

_BELONGS = {
    "checkpoints", "config.json", "metrics.jsonl", "tensorboard", "evaluation.json", "report.html",
    "extrapolation.png", "restarts.json", "heartbeat.json", "events.jsonl", "trainer.lock", "starts",
}  # fmt: skip


def _losses(workdir: str) -> list:
    with open(f"{workdir}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return [(line["step"], line["loss"]) for line in lines]


def _last(workdir: str, step: int) -> dict:
    """{name: array or JSON value}, read by Orbax alone."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
    handlers["data"] = ocp.JsonCheckpointHandler()
    with ocp.CheckpointManager(
        f"{workdir}/checkpoints", options=options, item_handlers=handlers
    ) as manager:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # there is only one here

        def arrays(saved):
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved.tree
            )
            return ocp.args.StandardRestore(abstract)

        saved = manager.item_metadata(step)
        items = {name: arrays(saved[name]) for name in ("params", "optimizer")}
        items["data"] = ocp.args.JsonRestore()
        restored = dict(manager.restore(step, args=ocp.args.Composite(**items)).items())
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def difference(whole: str, other: str, steps: int) -> str | None:
    """What differs between two workdirs whose runs have done so many steps, None if nothing does."""
    cli.quiet()
    a, b = _losses(whole), _losses(other)
    if [n for n, _ in b] != list(range(1, steps + 1)):
        return f"metrics.jsonl has the steps {[n for n, _ in b]}"
    for (n, one), (_, two) in zip(a, b, strict=True):
        if one != two:
            return f"the loss of step {n} is {two}, not {one}"
    a, b = _last(whole, steps), _last(other, steps)
    if a.keys() != b.keys():
        return f"the checkpoint has other parts: {sorted(a.keys() ^ b.keys())}"
    for name, leaf in a.items():
        one, two = np.asarray(leaf), np.asarray(b[name])
        if (one.dtype, one.shape, one.tobytes()) != (two.dtype, two.shape, two.tobytes()):
            return f"{name} of the checkpoint differs"
    for step in checkpoint.steps(other):
        if problems := checksums.verify(f"{other}/checkpoints/{step}"):
            return f"checkpoint {step}: {problems[0]}"
    left = set(os.listdir(other)) - _BELONGS
    names = os.listdir(f"{other}/checkpoints")
    left |= {name for name in names if not name.isdecimal() and not name.endswith(".damaged")}
    if left:
        return f"it left {sorted(left)}"
    with open(f"{whole}/evaluation.json") as one, open(f"{other}/evaluation.json") as two:
        if json.load(one)["results"] != json.load(two)["results"]:
            return "evaluation.json differs"
    return None
