"""Cycles of attention kernels: a small listing of bundles, and the grid of a call."""

import pytest

from bipe_jax.training import bundles, hlo


def listing():
    """Bundles of a loop: 100 in a row's first step, 500 of a block, 200 in the last step."""
    marks = {
        16: " LB: > { %1 = sphi /* iteration index */ }",
        20: "    : > { %2 = sbr.rel (%p1) target = $region8 }",
        120: " PF: > { %3 = sld } /* Start/End empty region 8 :: Start region 9 */",
        130: "    : > { %4 = sbr.rel (%p2) target = $region12 }",
        630: " PF: > { %5 = sld } /* Start/End empty region 12 */",
        640: "    : > { %6 = sbr.rel (%p3) target = $region14 }",
        840: " PF: > { %7 = sld } /* Start/End empty region 14 */",
        900: "    : > { %8 = scmp.ge.s32.totalorder %s, 10 /* loop exit test */ }",
        916: "    : > { %9 = sbr.rel (!%p4) target = $region99 }",
    }
    return "\n".join(f" 0x{i:x} {marks.get(i, '    : > { %0 = vadd }')}" for i in range(1, 930))


def test_bundles_of_a_kernel_and_the_grid_of_its_call():
    kernel = bundles.parse(listing())
    assert kernel == bundles.Kernel(step=900 - 16 - 800, row=300, block=500, steps=8)
    text = (
        "%splash_mha_dkv_no_residuals.1 = (bf16[1]) custom-call(%m, %m, %q, %k), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 9, \\"block_q_dkv\\": 256, \\"block_kv_dkv\\": 512}"\n'
        "}}"
    )
    table, q, k, half = hlo.arrays(
        "s8[1,4,2], bf16[2,3,1024,64], bf16[2,3,1024,64], bf16[6,512,64]"
    )
    program = hlo.parse(f"ENTRY %main (q: bf16[1]) -> bf16[1] {{\n  {text}\n}}\n")
    call = program.computations["main"][0]
    found = bundles.grid(call, [table, table, q, k])
    # Of keys from 0 on all four blocks of queries see the first, and the last two the second.
    assert found == bundles.Grid(steps=6 * 8, rows=6 * 2, blocks=6 * 6)
    # The listing's loop is a sixth of the grid, as if six cores had a part each.
    assert kernel.cycles(found) == 8 * 84 + (12 * 300 + 36 * 500) / 6
    last = bundles.grid(call, [table, table, half, k])
    assert last.blocks == 6 * 4


def test_a_listing_that_is_no_kernel_is_refused():
    with pytest.raises(ValueError, match="no loop"):
        bundles.parse(" 0x1 : { %0 = vadd }")
