"""Batches over several real processes: each reads what its devices hold, and together they hold all."""

import json

import numpy as np
import pytest
import several

PROGRAM = """
import json, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from tiny import tiny_plan
from bipe_jax import collectives, processes, sharding

mesh = json.loads(sys.argv[1])
processes.start()
process, count = jax.process_index(), jax.process_count()
config = tiny_plan(batch_size=8, **{f"mesh__{axis}": size for axis, size in mesh.items()})
mesh = sharding.make_mesh(config)
index, shards = sharding.data_shard(mesh, config.batch_size)
whole = np.arange(8 * 16).reshape(8, 16).astype(np.int32)
rows = np.split(whole, shards)[index]
batch = sharding.place_batch(mesh, {"tokens": rows}, shards)["tokens"]
assert batch.shape == whole.shape
for shard in batch.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])
# What all processes see of it.
sums = jax.jit(lambda x: x.sum(axis=1))(batch)
np.testing.assert_array_equal(multihost_utils.process_allgather(sums, tiled=True), whole.sum(axis=1))
values = [{"of": i, "text": "x" * i} for i in range(count)]
assert collectives.of_all_processes(values[process]) == values
print(json.dumps([index, shards]))
"""


def run(count: int, devices: int, mesh: dict) -> list:
    """(index, count) of the data shard that each process reports."""
    done = several.finish(several.start(count, devices, "-c", PROGRAM, json.dumps(mesh)), 120)
    assert [code for code, _, _ in done] == [0] * count, done
    return [json.loads(out.splitlines()[-1]) for _, out, _ in done]


@pytest.mark.parametrize(
    "count, devices, mesh, expected",
    [
        # Each process has rows of its own; two that share a block, or a model, read the same.
        (2, 2, {"data": 0}, [[0, 2], [1, 2]]),
        pytest.param(2, 1, {"context": 2}, [[0, 1], [0, 1]], marks=pytest.mark.slow),
        pytest.param(2, 1, {"tensor": 2}, [[0, 1], [0, 1]], marks=pytest.mark.slow),
        (4, 1, {"fsdp": 2, "context": 2}, [[0, 2], [0, 2], [1, 2], [1, 2]]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(count, devices, mesh, expected):
    found = run(count, devices, mesh)
    assert sorted(found) == expected
    assert np.unique([count for _, count in found]).size == 1
