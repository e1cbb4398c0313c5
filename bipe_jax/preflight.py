"""Compiles a config's train step for a TPU slice that need not be there, and says whether it fits.

python -m bipe_jax.preflight --config=configs/bipe_rope_151m.py [--topology=v5e:16x16] [--search]

A topology is a generation and a grid of chips, v5e:16x16; "*2" behind it is two such slices. Needs
the extra `preflight`. Exits with status 1 and says what to change if the step does not fit.
"""

import importlib.util
import itertools
import logging
import math
import os
import re
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from bipe_jax import cli, hardware, plan, sharding
from bipe_jax.data.batches import annotate
from bipe_jax.errors import UserError
from bipe_jax.flops import flops_per_token
from bipe_jax.hardware import GIB
from bipe_jax.model import REMAT_POLICIES
from bipe_jax.segments import Rule
from bipe_jax.training import roofline
from bipe_jax.training.step import compile_on

_LOG = logging.getLogger("bipe_jax.preflight")

_TRIES = 8  # compilations of one search


class Slice(NamedTuple):
    """A slice that need not be there. peak: FLOPs a second of a device."""

    name: str
    devices: list
    slices: int
    chip: hardware.Chip
    peak: float


class Fit(NamedTuple):
    """What compiling a train step told. Sizes in bytes, of one chip."""

    needed: float
    state: float  # parameters and optimizer, of what is needed
    collectives: dict  # kind -> (how often in a step, bytes of their results)


def describe(topology: str, config) -> Slice:
    """The devices of a slice, without having them.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    wanted = hardware.split_slice(topology, "--topology")
    options: dict[str, Any] = {"num_slices": wanted.slices} if wanted.slices > 1 else {}
    if wanted.chip.generation == "v4":
        options["chip_config_name"] = "megacore"  # two cores as one device
    # libtpu is to describe other machines, not to look for TPUs on this one.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.partition("*")[0], **options
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
    return Slice(topology, found.devices, wanted.slices, wanted.chip, peak)


def compile_for(config, mesh):
    """The compiled train step of a config on a mesh of devices that need not be there."""
    row = np.zeros((1, config.sequence_length + 1), np.int32)
    batch = annotate(row, Rule(length=8), row if config.data.separate_documents else None)
    shape = (config.batch_size, config.sequence_length)
    placed = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(shape, v.dtype, sharding=placed) for k, v in batch.items()}
    with jax.set_mesh(mesh):
        _, train_step, abstract = compile_on(config, mesh)
        return train_step.lower(abstract, batch).compile()


def fit(config, mesh) -> Fit:
    """Compiles; a step that the compiler itself finds too large has no collectives."""
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
    m: Any = compiled.memory_analysis()
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    needed += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Fit(needed, state, collectives(compiled.as_text() or ""))


_COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_CALL = re.compile(
    r"(?:body|calls|to_apply|called_computation|true_computation|false_computation)=%([\w.-]+)"
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(hlo: str) -> dict:
    """{kind: (times, bytes of results)} in one run of a compiled program, loops counted in full."""
    computations, name = {}, None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if header[1] else header[2]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def trips(condition):  # a scan compares its counter with a constant
        constants = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
        return max(map(int, constants), default=1)

    found: dict = {}
    seen = set()

    def visit(name, times):
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                size = sum(
                    _BYTES.get(kind, 4) * math.prod(map(int, filter(None, shape.split(","))))
                    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                )
                kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
                # An asynchronous one is written down once for each part that overlaps it.
                channel = re.search(r"channel_id=(\d+)", line)
                if channel and (channel[1], size, times) in seen:
                    continue
                seen.add((channel and channel[1], size, times))
                count, total = found.get(kind, (0, 0))
                found[kind] = (count + times, total + times * size)
                continue
            loop = re.search(r" while\(.*condition=%([\w.-]+)", line)
            inner = times * trips(loop[1]) if loop else times
            for called in _CALL.findall(line):
                visit(called, inner)

    visit("ENTRY", 1)
    return found


def advice(config, mesh, fit: Fit, chip: hardware.Chip) -> str:
    """What to change so that a step that does not fit may fit."""
    options = []
    if fit.state > chip.hbm / 2 and config.mesh.fsdp < mesh.size:
        options.append(f"raise config.mesh.fsdp={config.mesh.fsdp} (parameters and optimizer take "
                       f"{fit.state / GIB:.2f} GiB a chip)")  # fmt: skip
    remats = list(REMAT_POLICIES)
    if config.model.remat != remats[-1]:
        options.append(f"set config.model.remat={remats[remats.index(config.model.remat) + 1]}")
    rows = config.batch_size // config.accumulation // sharding.batch_shards(mesh)
    if rows > 1:
        options.append(f"raise config.accumulation={config.accumulation} ({rows} sequences at a "
                       "time on a chip)")  # fmt: skip
    elif config.mesh.fsdp < mesh.size:
        options.append("use a larger slice, or config.mesh.tensor and config.mesh.context")
    return ", or ".join(options) or "use a larger slice, or a smaller model"


def report(config, mesh, slice_: Slice, found: Fit) -> str:
    """The table that the program prints."""
    guess = roofline.estimate(config, mesh, slice_.chip, slice_.peak, slice_.slices)
    tokens = config.batch_size * config.sequence_length
    flops = tokens * flops_per_token(config)
    rate = tokens / guess.seconds
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = {
        "slice": f"{slice_.name}, {mesh.size} devices: {axes}",
        "parameters": f"{roofline.parameter_count(config):,}",
        "batch": f"{config.batch_size} x {config.sequence_length} tokens in {config.accumulation} "
        f"part(s), remat {config.model.remat}",
        "HBM a chip": f"{found.needed / GIB:.2f} of {slice_.chip.hbm / GIB:.2f} GiB "
        f"(state {found.state / GIB:.2f})",
        "model FLOPs": f"{flops:.3e} a step, {flops / mesh.size:.3e} a chip",
        "collectives": ", ".join(
            f"{count} {kind} ({size / GIB:.2f} GiB)"
            for kind, (count, size) in sorted(found.collectives.items())
        ) or "none",
        "step time": f"{guess.seconds * 1e3:.1f} ms at least (products {guess.products * 1e3:.1f}, "
        f"HBM {guess.hbm * 1e3:.1f}, links {guess.links * 1e3:.1f}); {rate:,.0f} tokens/s at most",
    }  # fmt: skip
    return "\n".join(f"{name:12} {value}" for name, value in rows.items())


def candidates(config, slice_: Slice) -> list:
    """(estimate, config, mesh) of all meshes, remat policies and accumulations, the best first."""
    found = []
    n = len(slice_.devices)
    powers = [2**i for i in range(n.bit_length()) if n % 2**i == 0]
    for fsdp, tensor, remat, parts in itertools.product(powers, powers, REMAT_POLICIES, powers):
        if fsdp * tensor * config.mesh.context > n or config.batch_size % parts:
            continue
        try:
            tried = config.replace({
                "mesh.data": 0, "mesh.fsdp": fsdp, "mesh.tensor": tensor,
                "model.remat": remat, "accumulation": parts,
            })  # fmt: skip
            mesh = sharding.make_mesh(tried, slice_.devices)
            sharding.check_batch(tried, mesh)
        except UserError:  # does not divide
            continue
        guess = roofline.estimate(tried, mesh, slice_.chip, slice_.peak, slice_.slices)
        if guess.memory < 1.2 * slice_.chip.hbm:
            found.append((guess, tried, mesh))
    # Of equals, what moves least.
    return sorted(found, key=lambda f: (f[0].seconds, f[0].links + f[0].hbm, f[1].accumulation))


def search(config, slice_: Slice):
    """Compiles the candidates, the best first, until one fits: (config, mesh, fit).

    Raises:
      UserError: none does.
    """
    tries = 0
    ratios: dict = {}  # of memory needed to memory estimated, the least seen, by remat policy
    for guess, tried, mesh in candidates(config, slice_):
        remat = tried.model.remat
        if guess.memory * ratios.get(remat, 0) > slice_.chip.hbm:
            continue
        found = fit(tried, mesh)
        fits = found.needed <= slice_.chip.hbm
        _LOG.info(
            f"{'fits' if fits else 'too large'}: {found.needed / GIB:.2f} GiB, "
            f"{guess.seconds * 1e3:.1f} ms: {_overrides(tried)}"
        )
        if fits:
            return tried, mesh, found
        ratios[remat] = min(ratios.get(remat, math.inf), found.needed / guess.memory)
        tries += 1
        if tries == _TRIES:
            break
    raise UserError(f"none of {tries} candidates fits {slice_.name}: use a larger slice")


def _overrides(config) -> str:
    return (
        f"--config.mesh.fsdp={config.mesh.fsdp} --config.mesh.tensor={config.mesh.tensor} "
        f"--config.model.remat={config.model.remat} --config.accumulation={config.accumulation}"
    )


def main(arguments: list[str]) -> None:
    parser = cli.Parser("bipe_jax.preflight", __doc__)
    parser.add_argument("--topology", help="a slice such as v5e:16x16 (the config's)")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat and accumulation; print the best"
    )
    args, config = parser.parse_with_config(arguments)
    config = plan.make(config)
    slice_ = describe(args.topology or config.mesh.topology, config)
    if args.search:
        config, mesh, found = search(config, slice_)
    else:
        mesh = sharding.make_mesh(config, slice_.devices)
        sharding.check_batch(config, mesh)
        found = fit(config, mesh)
    print(report(config, mesh, slice_, found))
    print(roofline.ASSUMPTIONS)
    if found.needed > slice_.chip.hbm:
        raise UserError(
            f"the step needs {found.needed / GIB:.2f} GiB of {slice_.chip.hbm / GIB:.2f} GiB a chip: "
            f"{advice(config, mesh, found, slice_.chip)} (or try --search)"
        )
    if args.search:
        print(f"best that fits: {_overrides(config)}")


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
