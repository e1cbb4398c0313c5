"""Compiles a config's train step for a TPU slice, without TPUs: whether it fits, and how long it takes.

python -m bipe_jax.preflight --config=configs/bipe_rope_151m.py [--topology=v5e:16x16] [--search] [--profile]

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
from bipe_jax.training import account, roofline
from bipe_jax.training.compiled import Fit, Slice, describe, fit

_LOG = logging.getLogger("bipe_jax.preflight")

_TRIES = 8  # compilations of one search
_FITTING = 3  # of them, which fit and of which the quickest is taken
_DEAREST = 40  # rows of a profile


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
    """The table that the program prints; without an account if the compiler refuses the step."""
    tokens = config.batch_size * config.sequence_length
    flops = tokens * flops_per_token(config)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = {
        "slice": f"{slice_.name}, {mesh.size} devices: {axes}",
        "parameters": f"{roofline.parameter_count(config):,}",
        "batch": f"{config.batch_size} x {config.sequence_length} tokens in {config.accumulation} "
        f"part(s), remat {config.model.remat}",
        "HBM a chip": f"{costs.needed / GIB:.2f} of {slice_.chip.hbm / GIB:.2f} GiB "
        f"(state {costs.state / GIB:.2f})",
        "model FLOPs": f"{flops:.3e} a step, {flops / mesh.size:.3e} a chip",
    }  # fmt: skip
    if costs.account:
        seconds = costs.account.seconds
        rows["collectives"] = ", ".join(
            f"{count} {kind} ({size / GIB:.2f} GiB)"
            for kind, (count, size) in sorted(costs.account.traffic().items())
        ) or "none"  # fmt: skip
        rows["step time"] = (
            f"{seconds * 1e3:.1f} ms by the compiled program's account, {tokens / seconds:,.0f} tokens/s, "
            f"MFU {flops / mesh.size / slice_.peak / seconds:.1%}"
        )
    lines = [f"{name:12} {value}" for name, value in rows.items()]
    if costs.account:
        lines += [
            f"  {kind:20}{seconds * 1e3:9.2f} ms{remark(kind)}"
            for kind, seconds in costs.account.by_kind().items()
            if seconds
        ]
    return "\n".join(lines)


def remark(kind: str) -> str:
    """What the table says after the time of a kind of operation."""
    return {
        account.HIDDEN: " (run beside other work, not in the sum)",
        account.UNKNOWN: " (by their bytes alone: too little)",
    }.get(kind, "")


def profile(costs: account.Account) -> str:
    """The instructions that take longest, and where in the model they come from."""
    rows = [
        f"{line.seconds * 1e3:9.2f} ms {line.times:6} x  {line.kind}: {line.opcode}  {line.origin}"
        for line in costs.dearest(_DEAREST)
    ]
    return "\n".join(rows)


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
    """Compiles candidates, the best by the roofline first, and takes the quickest of the first that fit.

    Raises:
      UserError: none fits.
    """
    tries = 0
    fitting: list[tuple[float, Plan, Mesh, Fit]] = []
    ratios: dict[
        str, float
    ] = {}  # remat policy -> least ratio of memory needed to memory estimated
    for guess, tried, mesh in candidates(config, slice_):
        if tries == _TRIES or len(fitting) == _FITTING:
            break
        remat = tried.model.remat
        if guess.memory * ratios.get(remat, 0) > slice_.chip.hbm:
            continue
        costs = fit(tried, mesh, slice_)
        tries += 1
        ratios[remat] = min(ratios.get(remat, math.inf), costs.needed / guess.memory)
        if not costs.account or costs.needed > slice_.chip.hbm:
            _LOG.info(f"too large: {costs.needed / GIB:.2f} GiB: {_overrides(tried)}")
            continue
        seconds = costs.account.seconds
        _LOG.info(
            f"fits: {costs.needed / GIB:.2f} GiB, {seconds * 1e3:.1f} ms: {_overrides(tried)}"
        )
        fitting.append((seconds, tried, mesh, costs))
    if not fitting:
        raise UserError(f"none of {tries} candidates fits {slice_.name}: use a larger slice")
    return min(fitting, key=lambda one: one[0])[1:]


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
        costs = fit(config, mesh, slice_)
    print(report(config, mesh, slice_, costs))
    if args.profile and costs.account:
        print(profile(costs.account))
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
