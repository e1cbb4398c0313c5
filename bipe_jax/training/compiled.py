"""Train steps that are compiled for TPU slices without having them: their memory and their account."""

import atexit
import functools
import importlib.util
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from bipe_jax import hardware, segments, sharding
from bipe_jax.data.batches import annotate
from bipe_jax.errors import UserError
from bipe_jax.hardware import GIB
from bipe_jax.plan import Plan
from bipe_jax.segments import Rule
from bipe_jax.training import bundles, hlo
from bipe_jax.training.account import Account
from bipe_jax.training.costing import cost
from bipe_jax.training.links import network
from bipe_jax.training.step import compile_on


class Slice(NamedTuple):
    """A TPU slice, which need not exist. grid: its chips. peak: FLOPs a second of a device."""

    name: str
    grid: str
    devices: list
    slices: int
    chip: hardware.Chip
    peak: float


class Fit(NamedTuple):
    """The costs of a compiled train step. Sizes are bytes of one chip."""

    needed: float  # memory
    state: float  # of which parameters and optimizer
    account: Account | None  # None: the compiler refuses the step


def describe(topology: str, config: Plan) -> Slice:
    """The slice of a topology, with descriptions of its devices.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    wanted = hardware.split_slice(topology, "--topology")
    options: dict[str, Any] = {"num_slices": wanted.slices} if wanted.slices > 1 else {}
    if wanted.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if wanted.chip.generation == "v4":
        options["chip_config_name"] = "megacore"  # two cores as one device
    # libtpu must not look for TPUs on this machine.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    _code_folder()
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{wanted.chip.generation}:{wanted.grid}",
            **options,
        )
    except Exception as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={topology}: compiling for TPUs needs the extra `preflight`: "
                "pip install -e '.[preflight]'"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology={topology}: {reason}: {hardware.SLICES}") from None
    peak = config.log.peak_flops or wanted.chip.peak_flops
    return Slice(wanted.name, wanted.grid, described.devices, wanted.slices, wanted.chip, peak)


@functools.cache
def _code_folder() -> Path:
    """Where libtpu, if it is loaded after the first call, writes the code of kernels; removed at the end."""
    folder = tempfile.mkdtemp(prefix="bipe_jax_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = bundles.FLAGS.format(folder)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return Path(folder)


def compile_for(config: Plan, mesh: Mesh) -> jax.stages.Compiled:
    """The compiled train step of a config on a mesh of devices that need not exist."""
    row = np.zeros((1, config.sequence_length + 1), np.int32)
    levels = segments.parse_levels(config.segments.levels)
    rule = Rule(length=8, coarser=tuple((name, Rule(length=8)) for name, _ in levels))
    ids = row if config.data.separate_documents else None
    sets = row if config.has_sets else None
    batch = annotate(row, rule, ids, sets=sets, among=sets)
    shape = (config.batch_size, config.sequence_length)
    axes = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(shape, v.dtype, sharding=axes) for k, v in batch.items()}
    with jax.set_mesh(mesh):
        _, train_step, abstract = compile_on(config, mesh)
        return train_step.lower(abstract, batch).compile()


def fit(config: Plan, mesh: Mesh, slice_: Slice) -> Fit:
    """The costs of a config's train step on a mesh of a slice's devices."""
    for file in _code_folder().iterdir():  # of the program before
        file.unlink()
    # A program from the cache would come without the code.
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.set_mesh(mesh):
        abstract = compile_on(config, mesh)[2]
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
    try:
        compiled = compile_for(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        # "Used 27.80G of 15.75G hbm", or "required for HLO temporaries (19.82G) exceeds"
        sizes = re.search(r"(Used |temporaries \()([\d.]+)G", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise
        needed = float(sizes[2]) * GIB + (0 if sizes[1] == "Used " else state)
        return Fit(needed, state, None)
    m, text = compiled.memory_analysis(), compiled.as_text()
    assert m is not None and text is not None
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    needed += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    links = network(slice_.chip, slice_.grid, list(mesh.devices.flat))
    return Fit(needed, state, cost(hlo.parse(text), links, bundles.read(_code_folder())))
