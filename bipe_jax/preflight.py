"""Compiles a config's train step for a TPU slice, without TPUs, and checks whether it fits.

python -m bipe_jax.preflight --config=configs/bipe_rope_151m.py [--topology=v5e:16x16] [--search]

A topology is a generation and a grid of chips, v5e:16x16; "*2" after it means two such slices. Needs
the extra `preflight`. Exits with status 1 and advises changes if the step does not fit.
"""

import itertools
import logging
import math
import sys

from jax.sharding import Mesh

from bipe_jax import cli, commands, hardware, plan, sharding
from bipe_jax.errors import UserError
from bipe_jax.flops import flops_per_token
from bipe_jax.hardware import GIB
from bipe_jax.model import REMAT_POLICIES
from bipe_jax.plan import Plan
from bipe_jax.training import roofline
from bipe_jax.training.compiled import Fit, Slice, describe, fit

_LOG = logging.getLogger("bipe_jax.preflight")

_TRIES = 8  # compilations of one search


def advice(config: Plan, mesh: Mesh, fit: Fit, chip: hardware.Chip) -> str:
    """The changes by which a step that does not fit may fit."""
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


def report(config: Plan, mesh: Mesh, slice_: Slice, costs: Fit) -> str:
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
        "HBM a chip": f"{costs.needed / GIB:.2f} of {slice_.chip.hbm / GIB:.2f} GiB "
        f"(state {costs.state / GIB:.2f})",
        "model FLOPs": f"{flops:.3e} a step, {flops / mesh.size:.3e} a chip",
        "collectives": ", ".join(
            f"{count} {kind} ({size / GIB:.2f} GiB)"
            for kind, (count, size) in sorted(costs.collectives.items())
        ) or "none",
        "step time": f"{guess.seconds * 1e3:.1f} ms at least (products {guess.products * 1e3:.1f}, "
        f"HBM {guess.hbm * 1e3:.1f}, links {guess.links * 1e3:.1f}); {rate:,.0f} tokens/s at most",
    }  # fmt: skip
    return "\n".join(f"{name:12} {value}" for name, value in rows.items())


def candidates(config: Plan, slice_: Slice) -> list[tuple[roofline.Estimate, Plan, Mesh]]:
    """All meshes, remat policies and accumulations, the best by their estimates first."""
    options = []
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
            options.append((guess, tried, mesh))
    # Among equals, the least traffic.
    return sorted(options, key=lambda f: (f[0].seconds, f[0].links + f[0].hbm, f[1].accumulation))


def search(config: Plan, slice_: Slice) -> tuple[Plan, Mesh, Fit]:
    """Compiles the candidates, the best first, until one fits.

    Raises:
      UserError: none fits.
    """
    tries = 0
    ratios: dict[
        str, float
    ] = {}  # remat policy -> least ratio of memory needed to memory estimated
    for guess, tried, mesh in candidates(config, slice_):
        remat = tried.model.remat
        if guess.memory * ratios.get(remat, 0) > slice_.chip.hbm:
            continue
        costs = fit(tried, mesh)
        fits = costs.needed <= slice_.chip.hbm
        _LOG.info(
            f"{'fits' if fits else 'too large'}: {costs.needed / GIB:.2f} GiB, "
            f"{guess.seconds * 1e3:.1f} ms: {_overrides(tried)}"
        )
        if fits:
            return tried, mesh, costs
        ratios[remat] = min(ratios.get(remat, math.inf), costs.needed / guess.memory)
        tries += 1
        if tries == _TRIES:
            break
    raise UserError(f"none of {tries} candidates fits {slice_.name}: use a larger slice")


def _overrides(config: Plan) -> str:
    return (
        f"--config.mesh.fsdp={config.mesh.fsdp} --config.mesh.tensor={config.mesh.tensor} "
        f"--config.model.remat={config.model.remat} --config.accumulation={config.accumulation}"
    )


def main(arguments: list[str]) -> None:
    args, config = commands.parser("preflight").parse_with_config(arguments)
    config = plan.make(config)
    slice_ = describe(args.topology or config.mesh.topology, config)
    if args.search:
        config, mesh, costs = search(config, slice_)
    else:
        mesh = sharding.make_mesh(config, slice_.devices)
        sharding.check_batch(config, mesh)
        costs = fit(config, mesh)
    print(report(config, mesh, slice_, costs))
    print(roofline.ASSUMPTIONS)
    if costs.needed > slice_.chip.hbm:
        raise UserError(
            f"the step needs {costs.needed / GIB:.2f} GiB of {slice_.chip.hbm / GIB:.2f} GiB a chip: "
            f"{advice(config, mesh, costs, slice_.chip)} (or try --search)"
        )
    if args.search:
        print(f"best that fits: {_overrides(config)}")
    cli.check_printed()


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
