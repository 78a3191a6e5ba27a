"""Devices, precision, and the table of peaks."""

import pytest
import torch

import device
from errors import UserError


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_whole_words_of_the_name(name, peak):
    assert device._peak_of(name) == peak


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="device='tpu'"):
        device.pick_device("tpu")
    with pytest.raises(UserError, match="device='mps' is not supported"):
        device.pick_device("mps")
    with pytest.raises(UserError, match="one device for 2 processes: use device=cuda"):
        device.pick_device("cuda:0", world_size=2)
    with pytest.raises(UserError, match="usable CUDA devices"):
        device.pick_device("cuda", local_rank=torch.cuda.device_count())


def test_autocast_is_what_the_option_says():
    cpu = device.pick_device("cpu")
    x = torch.ones(2, 2)
    for dtype, expected in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with device.autocast(cpu, dtype):
            assert (x @ x).dtype == expected
    assert device.peak_memory(cpu) > 2**20
