"""Chips and GPUs: what launchers and metrics take from the one table."""

import pytest

from bipe_jax import hardware

# By the makers' data sheets; dense bfloat16, of one device.
PEAKS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "cpu": None,
}


@pytest.mark.parametrize("kind", PEAKS)
def test_peaks_go_by_the_longest_beginning_of_the_device_kind(kind):
    assert hardware.peak_flops(kind) == PEAKS[kind]


def test_what_the_clouds_call_the_hardware():
    assert {name: (gpu.gke, gpu.sky) for name, gpu in hardware.GPUS.items()} == {
        "l4": ("nvidia-l4", "L4"),
        "a100": ("nvidia-tesla-a100", "A100"),
        "a100-80gb": ("nvidia-a100-80gb", "A100-80GB"),
        "h100": ("nvidia-h100-80gb", "H100"),
        "h100-mega": ("nvidia-h100-mega-80gb", "H100-MEGA"),
        "h200": ("nvidia-h200-141gb", "H200"),
        "b200": ("nvidia-b200", "B200"),
    }
    assert {name: (chip.gke, chip.type, chip.runtime) for name, chip in hardware.CHIPS.items()} == {
        "v4": ("tpu-v4-podslice", "v4", "tpu-ubuntu2204-base"),
        "v5e": ("tpu-v5-lite-podslice", "v5litepod", "v2-alpha-tpuv5-lite"),
        "v5p": ("tpu-v5p-slice", "v5p", "v2-alpha-tpuv5"),
        "v6e": ("tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e"),
        "tpu7x": ("tpu7x", "", ""),
    }


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("v5e:2x2", True),
        ("v5e:16x16", True),
        ("v5p:2x2x1", True),
        ("v5p:8x16x16", True),
        ("v4:4x4x16", False),
        ("v5p:4x4x12", False),  # 192 chips: no power of two
    ],
)
def test_which_grids_an_accelerator_type_stands_for(text, default):
    assert hardware.parse_slice(text).default_grid == default


def test_a_grid_that_google_does_not_rent_out_can_still_be_named():
    assert hardware.split_slice("v5e:1x1", "--topology").chips == 1
