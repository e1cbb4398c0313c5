"""Preflight: real compilations for TPU slices where libtpu is installed, and the roofline anywhere.

JAX_PLATFORMS=cpu pytest tests/launch/test_preflight.py, with the extra `preflight`.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import kinds
import pytest
from paths import ROOT
from tiny import tiny_plan

from bipe_jax import model, plan, sharding
from bipe_jax.config import file
from bipe_jax.errors import UserError
from bipe_jax.experiments import registry
from bipe_jax.flops import flops_per_token
from bipe_jax.hardware import CHIPS
from bipe_jax.training import compiled, roofline, step


def configs() -> list[str]:
    """All shipped configs, and those of the experiments' size paper; of equal programs the first."""
    shipped = sorted((ROOT / "configs").glob("*.py"))
    names = [f"configs/{path.name}" for path in shipped if path.stem != "base"]
    names += [f"{one.config}:paper" for one in registry.EXPERIMENTS.values()]
    programs = {}
    for name in names:
        config = plan.make(file.load(f"{ROOT}/{name}"))
        parts = (config.model, config.position, config.segments, config.mesh, config.optimizer.name)
        programs.setdefault(repr((*parts, config.sequence_length, config.batch_size)), name)
    return list(programs.values())


with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra 'preflight'"
)


def run(*arguments):
    """python -m bipe_jax.preflight in a process of its own: libtpu is loaded once in each."""
    line = [sys.executable, "-m", "bipe_jax.preflight", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)


def table(done) -> dict:
    """{"HBM a chip": "5.14 of 15.75 GiB …", …} of a report."""
    assert done.returncode in (0, 1), done.stderr
    return {line[:12].strip(): line[13:] for line in done.stdout.splitlines()}


@with_libtpu
@pytest.mark.parametrize("name", configs())
def test_each_config_compiles_for_four_chips_of_its_generation(name):
    config = plan.make(file.load(f"{ROOT}/{name}"))
    generation = config.mesh.topology.partition(":")[0]
    assert generation in CHIPS
    grid = {"v4": "2x2x1", "v5p": "2x2x1", "tpu7x": "2x2x1"}.get(generation, "2x2")
    chips = math.prod(map(int, config.mesh.topology.partition(":")[2].split("x")))
    rows = max(4 * config.batch_size // chips, 4)  # as many a chip as on the slice it is meant for
    done = run(
        f"--config={name}",
        f"--topology={generation}:{grid}",
        f"--config.batch_size={rows}",
        f"--config.mesh.fsdp={min(config.mesh.fsdp, 4)}",
    )
    assert done.returncode == 0, done.stderr
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert table(done)["parameters"] == f"{parameters:,}"


TINY = (
    "--config=configs/smoke.py", "--config.model.kv_heads=2", "--config.model.heads=4",
    "--config.model.width=256", "--config.sequence_length=512",
)  # fmt: skip


@with_libtpu
@pytest.mark.parametrize(
    "topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "v5e:2x2*2"]
)
@pytest.mark.parametrize("encoding", ["bipe_alibi"])
def test_every_generation_and_several_slices_compile(topology, encoding):
    done = run(
        f"--config=configs/smoke.py:{encoding}", *TINY[1:], f"--topology={topology}", "--profile"
    )
    assert done.returncode == 0, done.stderr
    assert "all-reduce" in table(done)["collectives"]
    assert_accounted(done)
    assert re.search(r"ms +2 x  attention kernels: custom-call  jit.*splash_mha_fwd", done.stdout)


def assert_accounted(done):
    """The kinds of operations sum to the step's time, and each instruction has a cost."""
    kinds = dict(re.findall(r"^  ([a-z ]+?) +([\d.]+) ms", done.stdout, re.MULTILINE))
    assert {"products", "attention kernels", "elementwise", "collectives"} <= set(kinds)
    assert "not costed" not in kinds
    kinds.pop("hidden collectives", None)
    seconds = float(table(done)["step time"].partition(" ms")[0])
    assert sum(map(float, kinds.values())) == pytest.approx(seconds, abs=0.1)


@with_libtpu
@pytest.mark.parametrize("name", kinds.MODELS)
def test_every_kind_compiles_with_documents_on_all_axes(name):
    tensor = 1 if name == "adapting" else 2  # DAPE mixes the heads
    done = run(
        *TINY, "--config.model.layers=4", "--config.position.absolute=()",
        f"--config.position.relative={kinds.MODELS[name]!r}", "--config.data.separate_documents=True",
        f"--config.mesh.fsdp={4 // tensor}", f"--config.mesh.tensor={tensor}", "--config.mesh.context=2",
        "--topology=v5e:2x4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@with_libtpu
def test_levels_compile_on_all_axes():
    relative = (("rope", "segment_in_paragraph"), ("alibi", "paragraph"), ("fox", "chapter"))
    done = run(
        *TINY, "--config.segments.levels=('paragraph','chapter')",
        "--config.position.absolute=(('learned','paragraph_offset'),)",
        f"--config.position.relative={relative!r}", "--config.data.separate_documents=True",
        "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.context=2",
        "--topology=v5e:2x4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@with_libtpu
def test_every_axis_with_documents_compiles_and_gathers_what_it_should():
    done = run(
        *TINY, "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.context=2",
        "--config.data.separate_documents=True", "--topology=v5e:2x4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data 1 x fsdp 2 x tensor 2 x context 2" in table(done)["slice"]
    assert {"all-gather", "all-reduce"} <= set(table(done)["collectives"].replace(",", "").split())
    assert_accounted(done)


@with_libtpu
def test_a_step_that_does_not_fit_says_what_to_change():
    done = run(
        *TINY, "--config.model.width=4096", "--config.model.feed_forward=16384",
        "--config.model.layers=32", "--config.model.remat=none",
        "--topology=v5e:2x2",
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the step needs ")
    assert "of 15.75 GiB a chip: raise config.mesh.fsdp=1" in last
    assert "config.model.remat=dots" in last


@with_libtpu
def test_search_finds_what_fits():
    large = (
        *TINY, "--config.model.width=2048", "--config.model.feed_forward=8192",
        "--config.model.layers=24", "--config.model.heads=16", "--config.batch_size=64",
        "--config.model.dtype=bfloat16", "--topology=v5e:2x2",
    )  # fmt: skip
    done = run(*large, "--search")
    assert done.returncode == 0, done.stderr
    best = done.stdout.splitlines()[-1]
    assert best.startswith("best that fits: --config.mesh.fsdp=")
    used, _, has = table(done)["HBM a chip"].split()[:3]
    assert float(used) <= float(has)
    again = run(*large, *best.split()[3:])
    assert table(again)["HBM a chip"] == table(done)["HBM a chip"]


@with_libtpu
@pytest.mark.parametrize(
    "topology", ["v9:2x2", "v5e", "v5e:3x3", "v5e:2x2*0", "v5e:2x2x2x2", "cpu", "v5e:2x2*x"]
)
def test_an_unknown_topology_lists_the_known_ones(topology):
    done = run("--config=configs/smoke.py", f"--topology={topology}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: --topology={topology}")
    assert "v5e and v6e have 1x1, 2x2" in last


def test_without_libtpu_the_extra_is_named(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("Failed to open libtpu.so")

    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[preflight\]'"):
        compiled.describe("v5e:2x2", tiny_plan())


class Mesh:
    def __init__(self, *sizes):
        self.shape = dict(zip(sharding.AXES, sizes, strict=True))
        self.size = math.prod(sizes)


def test_the_estimate_of_products_is_the_model_flops_over_the_peak():
    config = tiny_plan(model__remat="none")
    chip = CHIPS["v5e"]
    flops = 4 * 16 * flops_per_token(config)
    guess = roofline.estimate(config, Mesh(4, 1, 1, 1), chip, 1e9)
    assert guess.products == pytest.approx(flops / 4 / 1e9)
    config = config.replace({"model.remat": "full"})
    guess = roofline.estimate(config, Mesh(4, 1, 1, 1), chip, 1e9)
    assert guess.products == pytest.approx(flops / 4 / 1e9 * 4 / 3)


def test_the_estimate_of_links_counts_gradients_and_gathered_weights():
    config = tiny_plan(model__dtype="float32")
    chip = CHIPS["v5e"]
    size = 4 * roofline.parameter_count(config)
    by_data = roofline.estimate(config, Mesh(4, 1, 1, 1), chip, 1e9)
    assert by_data.links == pytest.approx(2 * 3 / 4 * size / chip.ici)
    over_slices = roofline.estimate(config, Mesh(4, 1, 1, 1), chip, 1e9, slices=2)
    assert over_slices.links == pytest.approx(2 * 3 / 4 * size / chip.dcn)
    by_fsdp = roofline.estimate(config, Mesh(1, 4, 1, 1), chip, 1e9)
    assert by_fsdp.links == pytest.approx(3 * 3 / 4 * size / chip.ici)
    assert by_fsdp.memory < by_data.memory


def test_parameters_are_counted_from_the_state():
    config = tiny_plan()
    params = step.init_state(config, jax.random.key(0))["params"]
    assert roofline.parameter_count(config) == sum(x.size for x in jax.tree.leaves(params))
