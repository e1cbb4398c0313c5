"""What a TPU slice's name says, beside figures from the tables of Google's pages."""

import importlib.util
import os
import subprocess
import sys

import pytest
from paths import ROOT

from bipe_jax.errors import UserError
from bipe_jax.hardware import parse_slice


@pytest.mark.parametrize(
    "text, count, chips, hosts, host_chips, devices",
    [
        # "ct5lp-hightpu-4t", "16x16": 64 nodes; "ct5lp-hightpu-8t", "2x4": 1 node.
        ("v5e:16x16", 1, 256, 64, 4, 256),
        ("v5e:16x16*2", 2, 256, 64, 4, 512),
        ("v5e:2x4", 1, 8, 1, 8, 8),
        ("v5e:1x1", 1, 1, 1, 1, 1),
        ("v6e:1x1", 1, 1, 1, 1, 1),
        ("v6e:2x2", 1, 4, 1, 4, 4),
        ("v4:2x2x1", 1, 4, 1, 4, 4),
        ("v5p:4x4x8*3", 3, 128, 32, 4, 384),
        ("v5p:8x8x12", 1, 768, 192, 4, 768),
        ("tpu7x:2x2x1", 1, 4, 1, 4, 8),  # two devices a chip
    ],
)
def test_a_name_says_chips_hosts_and_devices(text, count, chips, hosts, host_chips, devices):
    found = parse_slice(text)
    assert (found.slices, found.chips, found.hosts) == (count, chips, hosts)
    assert (found.host_chips, found.devices, found.name) == (host_chips, devices, text)


# As the tables of Google's pages pair accelerator types and topologies.
@pytest.mark.parametrize(
    "text, name",
    [
        ("v4-8", "v4:2x2x1"),
        ("v4-16", "v4:2x2x2"),
        ("v4-32", "v4:2x2x4"),
        ("v4-64", "v4:2x4x4"),
        ("v4-512", "v4:4x8x8"),
        ("v5litepod-1", "v5e:1x1"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5litepod-128*3", "v5e:8x16*3"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-2048", "v5p:8x8x16"),
        ("v6e-1", "v6e:1x1"),
        ("v6e-32", "v6e:4x8"),
    ],
)
def test_googles_names_stand_for_their_default_grids(text, name):
    found = parse_slice(text)
    assert found.name == name
    assert found.accelerator_type == text.partition("*")[0] and found.default_grid


DESCRIBE = """
import sys
from bipe_jax.training import compiled
from configs.smoke import get_config

for text in sys.argv[1:]:
    devices = compiled.describe(text, get_config()).devices
    print(text, len(devices), len({device.process_index for device in devices}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra 'preflight'"
)
def test_libtpu_counts_the_same():
    texts = ["v4:2x2x1", "v5e:1x1", "v4:4x4x8", "v5e:2x2", "v5e:4x8*3", "v5e:16x16", "v5litepod-4*2",
             "v5p:2x2x2", "v5p:4x4x4*2", "v5p:8x8x12", "v6e:8x16", "tpu7x:2x2x1", "tpu7x:2x2x2*2",
             "tpu7x:4x4x4"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, *texts],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    ours = [(text, parse_slice(text)) for text in texts]
    assert found == [[t, str(s.devices), str(s.hosts * s.slices)] for t, s in ours]


@pytest.mark.parametrize(
    "text",
    ["v5litepod-17", "v4-9", "v6e-0", "v6e-512", "tpu7x-8", "-8", "v5litepod-8*", "v5e", "v5e:", "v5e:3x3",
     "v5e:32x32", "v5e:2x2x1", "v5e:2x2*0", "v5e:2x2*x", "v5p:16x16",
     "v5p:8x4x4", "v5p:4x4x6", "v5p:16x24x24", "v9:2x2", "v5e:02x2", "v5e:2x2\n", ""],
)  # fmt: skip
def test_an_unknown_slice_is_one_line_that_lists_the_known(text):
    with pytest.raises(UserError, match="is unknown: v5e and v6e have 1x1, 2x2") as error:
        parse_slice(text)
    assert text.strip() in str(error.value)
