"""What a TPU slice's name says, beside figures from the tables of Google's pages."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bipe_jax.errors import UserError
from bipe_jax.hardware import parse_slice


@pytest.mark.parametrize(
    "text, count, chips, hosts, host_chips, devices",
    [
        # "ct5lp-hightpu-4t", "16x16": 64 nodes; "ct5lp-hightpu-8t", "2x4": 1 node.
        ("v5e:16x16", 1, 256, 64, 4, 256),
        ("v5e:16x16*2", 2, 256, 64, 4, 512),
        ("v5e:2x4", 1, 8, 1, 8, 8),
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
    texts = ["v4:2x2x1", "v4:4x4x8", "v5e:2x2", "v5e:4x8*3", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x4*2",
             "v5p:8x8x12", "v6e:8x16", "tpu7x:2x2x1", "tpu7x:2x2x2*2", "tpu7x:4x4x4"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, *texts],
        cwd=Path(__file__).parents[1],
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
    ["v5e", "v5e:", "v5e:3x3", "v5e:32x32", "v5e:2x2x1", "v5e:2x2*0", "v5e:2x2*x", "v5p:16x16",
     "v5p:8x4x4", "v5p:4x4x6", "v5p:16x24x24", "v9:2x2", "v5e:02x2", "v5e:2x2\n", ""],
)  # fmt: skip
def test_an_unknown_slice_is_one_line_that_lists_the_known(text):
    with pytest.raises(UserError, match="is unknown: v5e and v6e have 2x2, 2x4") as error:
        parse_slice(text)
    assert text.strip() in str(error.value)
