"""Times of collectives over the links of slices, beside figures by hand."""

import pytest

from bipe_jax.hardware import CHIPS
from bipe_jax.training import links

V5E = CHIPS["v5e"]
LINK = 0.9 * 50e9


def slice_of(*sides):
    """Chips of a v5e slice, in the order of a mesh over them row by row."""
    places = tuple(links.Place((x, y)) for x in range(sides[0]) for y in range(sides[1]))
    return links.Network(V5E, sides, places)


def test_links_of_a_line_of_a_ring_and_of_interleaved_groups():
    whole = slice_of(16, 16)
    row = [16 * 3 + i for i in range(16)]
    size, hops = 1e9, 1e-6
    line = whole.seconds("all-gather", size, row[:8])  # half a row: one link in, seven hops
    assert line == pytest.approx(7 / 8 * size / LINK + 7 * hops)
    ring = whole.seconds("all-gather", size, row)
    assert ring == pytest.approx(15 / 16 * size / (2 * LINK) + 8 * hops)
    assert whole.seconds("all-reduce", size, row) == pytest.approx(2 * ring)
    # Every other chip round the ring: two groups share its links.
    assert whole.seconds("reduce-scatter", size, row[::2]) == pytest.approx(
        7 / 8 * size / LINK + 8 * hops
    )
    # All chips: two rings.
    assert whole.seconds("all-gather", size, []) == pytest.approx(
        255 / 256 * size / (4 * LINK) + 16 * hops
    )
    assert whole.seconds("all-gather", size, [7]) == 0


def test_between_slices_each_device_brings_its_part_over_the_network():
    places = tuple(links.Place((i % 4 // 2, i % 2), i // 4) for i in range(8))
    two = links.Network(V5E, (2, 2), places)
    within = links.Network(V5E, (2, 2), places[:4]).seconds("all-reduce", 1e9, [])
    assert two.seconds("all-reduce", 1e9, []) == pytest.approx(within + 2 * 0.5 * 1e9 / 4 / V5E.dcn)
