"""Train steps that are compiled for TPU slices without having them: memory and collectives."""

import importlib.util
import math
import os
import re
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
from bipe_jax.training.step import compile_on


class Slice(NamedTuple):
    """A TPU slice, which need not exist. peak: FLOPs a second of a device."""

    name: str
    devices: list
    slices: int
    chip: hardware.Chip
    peak: float


class Fit(NamedTuple):
    """The costs of a compiled train step. Sizes are bytes of one chip."""

    needed: float  # memory
    state: float  # of which parameters and optimizer
    collectives: dict  # kind -> (count in a step, bytes of the results)


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
    return Slice(wanted.name, described.devices, wanted.slices, wanted.chip, peak)


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


def fit(config: Plan, mesh: Mesh) -> Fit:
    """The costs of a config's train step; a step that the compiler refuses has no collectives."""
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
        return Fit(needed, state, {})
    m, hlo = compiled.memory_analysis(), compiled.as_text()
    assert m is not None and hlo is not None
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    needed += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Fit(needed, state, collectives(hlo))


_COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_CALL = re.compile(
    r"(?:body|calls|to_apply|called_computation|true_computation|false_computation)=%([\w.-]+)"
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Collectives of a compiled program: {kind: (count, bytes of results)}, loops counted in full."""
    computations: dict[str, list[str]] = {}
    name = None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if header[1] else header[2]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def trips(condition):  # a scan compares its counter with a constant
        constants = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
        return max(map(int, constants), default=1)

    sums: dict[str, tuple[int, int]] = {}
    seen = set()

    def visit(name, times):
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                size = sum(
                    _BYTES.get(kind, 4) * math.prod(map(int, filter(None, shape.split(","))))
                    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                )
                kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
                # An asynchronous one is listed once for each part that overlaps it.
                channel = re.search(r"channel_id=(\d+)", line)
                if channel and (channel[1], size, times) in seen:
                    continue
                seen.add((channel and channel[1], size, times))
                count, total = sums.get(kind, (0, 0))
                sums[kind] = (count + times, total + times * size)
                continue
            loop = re.search(r" while\(.*condition=%([\w.-]+)", line)
            inner = times * trips(loop[1]) if loop else times
            for called in _CALL.findall(line):
                visit(called, inner)

    visit("ENTRY", 1)
    return sums
