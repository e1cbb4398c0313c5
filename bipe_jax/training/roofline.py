"""A train step's roofline from shapes alone, by which `preflight` orders what it has not compiled.

The longest of three, each at its peak rate. Products: model FLOPs, plus the recomputation of remat. HBM:
weights read for each pass, gradients and optimizer (28 bytes a parameter), 8 D + 3 F values a token and
layer, three times. Links: weights gathered twice (fsdp), gradients summed (data, fsdp), activations summed
(tensor), keys and values gathered (context), over all links of a chip evenly. The time of a compiled step is
in `costing`.
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from bipe_jax import sharding
from bipe_jax.flops import flops_per_token
from bipe_jax.hardware import Chip
from bipe_jax.plan import Plan
from bipe_jax.training import step

# Forward passes over the layers, of which remat adds one.
_FORWARDS = {"none": 1, "dots": 1, "full": 2}


class Estimate(NamedTuple):
    """The estimate of a step: seconds, and bytes a chip."""

    products: float
    hbm: float
    links: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.hbm, self.links)


def parameter_count(config: Plan) -> int:
    """The number of parameters."""
    shapes = jax.eval_shape(lambda: step.init_state(config, jax.random.key(0)))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def estimate(config: Plan, mesh: Mesh, chip: Chip, peak: float, slices: int = 1) -> Estimate:
    """The estimate of a config's train step on a mesh, of which only the sizes count.

    Args:
      chip: the kind of the devices. peak: FLOPs a second of a device.
      slices: that the data axis spans.
    """
    m = config.model
    data, fsdp, tensor, context = (mesh.shape[axis] for axis in sharding.AXES)
    parameters = parameter_count(config)
    own = parameters / (fsdp * tensor)  # of one device
    tokens = config.batch_size * config.sequence_length / mesh.size
    forwards = _FORWARDS[m.remat]
    width = jax.numpy.dtype(m.dtype).itemsize

    flops = tokens * flops_per_token(config) * (2 + forwards) / 3

    rows = tokens * tensor  # activations of width D are replicated over `tensor`
    values = (2 * m.width + (6 * m.width + 3 * m.feed_forward) / tensor) * width
    activations = rows * m.layers * values * 3
    weights = parameters / tensor * width * (1 + forwards) * config.accumulation
    traffic = activations + weights + 28 * own

    gathered = (1 - 1 / fsdp) * parameters / tensor * width
    links = 3 * gathered * config.accumulation  # forward, backward, and the gradients
    across = 2 * (1 - 1 / data) * own * width * config.accumulation
    links += 2 * (1 - 1 / tensor) * rows * m.width * width * 2 * m.layers * (1 + forwards)
    keys = 2 * tokens * m.width * m.kv_heads / m.heads * width
    links += (context - 1) * keys * m.layers * (1 + forwards)
    seconds = links / chip.ici
    seconds += across / chip.ici if slices == 1 else across / chip.dcn

    kept = {
        "none": 8 * m.width + (8 * m.width + 5 * m.feed_forward) / tensor,
        "dots": 3 * m.width + (4 * m.width + 2 * m.feed_forward) / tensor,
        "full": m.width,
    }[m.remat]
    memory = 16 * own + rows / config.accumulation * m.layers * kept * width
    return Estimate(flops / peak, traffic / chip.hbm_bandwidth, seconds, memory)
