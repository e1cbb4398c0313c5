"""The account of compiled programs: small ones with known costs, and a real one where libtpu is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest
from paths import ROOT

from bipe_jax.hardware import CHIPS
from bipe_jax.training import account, bundles, hlo, links
from bipe_jax.training.costing import HBM_EFFICIENCY, cost

V5E = CHIPS["v5e"]
HBM = HBM_EFFICIENCY * V5E.hbm_bandwidth
LINK = 0.9 * 50e9


def network(*sides):
    """Chips of a v5e slice, in the order of a mesh over them row by row."""
    places = tuple(links.Place((x, y)) for x in range(sides[0]) for y in range(sides[1]))
    return links.Network(V5E, sides, places)


def account_of(text, sides=(2, 2), kernels=None):
    return cost(hlo.parse(text), network(*sides), kernels or {})


def product(name, operands="%a, %b", cycles=3000, inner="%product"):
    return (
        f"  %{name} = bf16[256,256]{{1,0:T(8,128)(2,1)S(1)}} fusion({operands}), calls={inner}, "
        f'metadata={{op_name="layer/{name}"}}, '
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


PRODUCT = """
%product (p: bf16[256,256], q: bf16[256,256]) -> bf16[256,256] {
  %p = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} convolution(%p, %q), dim_labels=bf_io->bf
}
"""
MATRICES = """  %a = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
"""


def entry(*lines):
    return (
        "ENTRY %main (a: bf16[256,256], b: bf16[256,256]) -> bf16[] {\n"
        + "\n".join(lines)
        + "\n}\n"
    )


def loop(name, turns, *lines):
    return f"""
%{name}.condition (s: (s32[])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant({turns})
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%{name}.body (s: (s32[])) -> (s32[]) {{
{MATRICES}{chr(10).join(lines)}
}}
"""


def turn(name):
    return f"  %{name} = (s32[]) while(%a), condition=%{name}.condition, body=%{name}.body"


def test_products_of_nested_loops_are_counted_by_all_turns():
    text = PRODUCT + loop("inner", 5, product("x")) + loop("outer", 3, product("y"), turn("inner"))
    text += entry(MATRICES, turn("outer"), product("z", cycles=700))
    found = account_of(text)
    cycles = 3 * 5 * 3000 + 3 * 3000 + 700
    assert found.seconds == pytest.approx(cycles / (197e12 / (2 * 65536)))
    assert {line.origin: line.times for line in found.lines} == {
        "layer/x": 15,
        "layer/y": 3,
        "layer/z": 1,
    }
    assert [line.origin for line in found.dearest(2)] == ["layer/x", "layer/y"]


def test_a_known_trip_count_comes_before_the_condition():
    text = PRODUCT + loop("inner", 5, product("x"))
    known = turn("inner") + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert [line.times for line in account_of(text + entry(MATRICES, known)).lines] == [7]


def test_a_fusion_that_is_called_twice_costs_twice_and_its_hbm_if_that_takes_longer():
    slow = product("y", operands="%far, %b", cycles=10)
    far = "  %far = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(2)"
    found = account_of(PRODUCT + entry(MATRICES, far, product("x"), slow))
    assert found.by_kind()[account.PRODUCTS] == pytest.approx(
        3000 / V5E.clock + 256 * 256 * 2 / HBM
    )


def test_without_cycles_a_product_is_said_to_be_not_costed():
    line = product("x").partition(", backend_config")[0]
    found = account_of(PRODUCT + entry(MATRICES, line))
    assert [line.kind for line in found.lines] == [account.UNKNOWN]


SLICES = """
%take (p: f32[12,64,32], i: s32[]) -> f32[1,64,32] {
  %p = f32[12,64,32]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,64,32]{2,1,0:T(8,128)S(1)} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,64,32}
}

%put (p: f32[12,64,32], u: f32[1,64,32], i: s32[]) -> f32[12,64,32] {
  %p = f32[12,64,32]{2,1,0:T(8,128)} parameter(0)
  %u = f32[1,64,32]{2,1,0:T(8,128)S(1)} parameter(1)
  %n = f32[1,64,32]{2,1,0:T(8,128)S(1)} negate(%u)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[12,64,32]{2,1,0:T(8,128)} dynamic-update-slice(%p, %n, %i, %z, %z)
}
"""


def test_slices_cost_themselves_with_the_padding_of_their_tiles():
    found = account_of(
        SLICES
        + entry(
            "  %all = f32[12,64,32]{2,1,0:T(8,128)} parameter(0)",
            "  %i = s32[]{:S(2)} parameter(1)",
            "  %taken = f32[1,64,32]{2,1,0:T(8,128)S(1)} fusion(%all, %i), kind=kLoop, calls=%take",
            "  %in = f32[12,64,32]{2,1,0:T(8,128)} fusion(%all, %taken, %i), kind=kLoop, calls=%put",
        )
    )
    padded = 64 * 128 * 4  # 32 lanes take the room of 128
    assert found.by_kind()[account.COPIES] == pytest.approx(padded / HBM)
    assert found.by_kind()[account.ELEMENTWISE] == pytest.approx(padded / HBM)


SUM = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}
"""
SHARD = "  %shard = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(2)"
START = (
    "  %g = (bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[256,256]{1,0:T(8,128)(2,1)S(1)}) "
    "all-gather-start(%shard), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}"
)
DONE = "  %gathered = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%g)"
# Four chips in a square have two links in each; two hops from corner to corner.
GATHER = 3 / 4 * 256 * 256 * 2 / (2 * LINK) + 2e-6


@pytest.mark.parametrize("cycles", [300, 300_000])
def test_an_asynchronous_collective_is_hidden_as_far_as_work_covers_it(cycles):
    found = account_of(PRODUCT + entry(MATRICES, SHARD, START, product("x", cycles=cycles), DONE))
    work = cycles / V5E.clock
    kinds = found.by_kind()
    assert kinds[account.HIDDEN] == pytest.approx(min(GATHER, work))
    assert kinds[account.EXPOSED] == pytest.approx(max(GATHER - work, 0))
    assert found.seconds == pytest.approx(max(GATHER, work))
    assert found.traffic() == {"all-gather": (1, 256 * 256 * 2)}


def test_work_after_the_end_of_a_collective_hides_nothing():
    found = account_of(PRODUCT + entry(MATRICES, SHARD, START, DONE, product("x", cycles=300_000)))
    assert found.by_kind()[account.EXPOSED] == pytest.approx(GATHER)


def test_a_collective_in_fusions_is_one_that_the_product_between_them_covers():
    gather = (
        "all-gather(%s), channel_id=5, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}, "
        "dimensions={0}"
    )
    shard, whole = "bf16[64,256]{1,0:T(8,128)(2,1)}", "bf16[256,256]{1,0:T(8,128)(2,1)S(1)}"
    inner = "".join(
        f"""
%{name} (s: bf16[64,256]) -> bf16[256,256] {{
  %s = {shard} parameter(0)
  %g = {whole} {gather}
{line}
}}
"""
        for name, line in {
            "start": f'  ROOT %c = {whole} custom-call(%g), custom_call_target="AsyncCollectiveStart"',
            "beside": f"  ROOT %c = {whole} convolution(%g, %g), dim_labels=bf_io->bf",
            "done": f'  ROOT %c = {whole} custom-call(%g), custom_call_target="AsyncCollectiveDone"',
        }.items()
    )
    found = account_of(
        inner
        + entry(
            SHARD,
            f"  %one = {whole} fusion(%shard), kind=kCustom, calls=%start",
            product("two", operands="%one", cycles=300_000, inner="%beside"),
            f"  %three = {whole} fusion(%two), kind=kCustom, calls=%done",
        )
    )
    kinds = found.by_kind()
    assert kinds[account.HIDDEN] == pytest.approx(GATHER)
    assert (kinds[account.EXPOSED], kinds[account.PRODUCTS]) == (
        0,
        pytest.approx(300_000 / V5E.clock),
    )
    assert found.traffic() == {"all-gather": (1, 256 * 256 * 2)}


def test_collectives_are_counted_once_for_each_turn_of_a_loop():
    reduce = (
        "  %r = (f32[10]{0:T(128)}, f32[]{:T(128)}) all-reduce(%y, %z), channel_id=8, "
        "replica_groups={{0,1},{2,3}}, to_apply=%add"
    )
    values = "  %y = f32[10]{0:T(128)} parameter(2)\n  %z = f32[]{:T(128)} parameter(3)"
    found = account_of(SUM + loop("body", 24, values, reduce) + entry(turn("body")))
    size = 128 * 4 + 4
    assert found.traffic() == {"all-reduce": (24, 24 * size)}
    assert found.seconds == pytest.approx(24 * 2 * (size / 2 / LINK + 1e-6))


def test_copies_are_hidden_by_products_but_not_by_what_moves_bytes_itself():
    copies = [
        "  %far = f32[512,256]{1,0:T(8,128)} parameter(2)",
        "  %s = (f32[512,256]{1,0:T(8,128)S(1)}, f32[512,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%far)",
    ]
    done = "  %near = f32[512,256]{1,0:T(8,128)S(1)} copy-done(%s)"
    time = 512 * 256 * 4 / HBM
    covered = account_of(PRODUCT + entry(MATRICES, *copies, product("x", cycles=10**6), done))
    assert covered.by_kind()[account.COPIES] == 0
    moves = "  %n = f32[512,256]{1,0:T(8,128)S(1)} negate(%far)"
    beside = account_of(entry(*copies, moves, done))
    assert beside.by_kind()[account.COPIES] == pytest.approx(time)
    assert beside.seconds == pytest.approx(2 * time)


@pytest.mark.parametrize(
    "text, first",
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, dims={0}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dims={0}", [0, 2]),
        ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
        ("channel_id=1", None),
    ],
)
def test_groups_in_all_notations(text, first):
    found = hlo.groups(hlo.Instruction("x", "all-reduce", "f32[]", (), text))
    assert (found[0] if found else None) == first


def test_equal_kernels_cost_the_same_where_only_one_has_code():
    call = (
        "  %splash_mha_fwd_residuals.{} = (bf16[1]) custom-call(%m, %m, %q, %k), "
        'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{\n'
        '"xprof_metadata":"{{\\"block_q\\": 512, \\"block_kv\\": 512}}"\n'
        '}}}}, backend_config={{"custom_call_config":{{"body":"{}"}}}}'
    )
    operands = [
        "  %m = s8[1,2,2]{2,1,0:T(4,128)(4,1)S(1)} parameter(0)",
        *[f"  %{x} = bf16[1,2,1024,64]{{3,2,1,0:T(8,128)(2,1)S(1)}} parameter(1)" for x in "qk"],
    ]
    lines = [call.format(1, "TUzv"), call.format(2, "TUzv"), call.format(3, "another")]
    kernel = bundles.Kernel(step=10, row=100, block=1000, steps=8)
    found = account_of(entry(*operands, *lines), kernels={"splash_mha_fwd_residuals.2": kernel})
    one = (8 * 10 + 4 * 100 + 6 * 1000) / V5E.clock
    assert found.by_kind()[account.ATTENTION] == pytest.approx(2 * one)
    assert [line.origin for line in found.lines if line.kind == account.UNKNOWN] == [
        "splash_mha_fwd_residuals.3"
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra 'preflight'"
)
def test_the_products_of_a_real_program_take_what_their_flops_take():
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tiny import tiny_plan
from bipe_jax.training import account, compiled, costing, hlo, links
slice_ = compiled.describe("v5e:2x2", tiny_plan())
one = NamedSharding(Mesh(np.array(slice_.devices[:1]), ("x",)), P())
x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=one)
def turns(x, y):
    return jax.lax.scan(lambda x, _: ((x @ y), None), x, None, length=5)[0]
text = jax.jit(turns).lower(x, x).compile().as_text()
network = links.network(slice_.chip, slice_.grid, slice_.devices)
found = costing.cost(hlo.parse(text), network, {}).by_kind()
print(found[account.PRODUCTS] / (5 * 2 * 4096**3 / slice_.peak), found[account.UNKNOWN])
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    environment["PYTHONPATH"] += f":{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    ratio, unknown = map(float, done.stdout.split())
    assert 1 < ratio < 1.05
    assert unknown == 0
