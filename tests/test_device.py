"""Devices, precision, and the table of peaks."""

import pytest
import torch

from stagewise import device
from stagewise.errors import UserError


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
def test_peaks_are_found_by_complete_words_of_the_name(name, peak):
    assert device._peak_of(name) == peak


def test_missing_and_unsupported_devices_are_errors():
    with pytest.raises(UserError, match="device='tpu'"):
        device.pick_device("tpu")
    with pytest.raises(UserError, match="device='mps' is not supported"):
        device.pick_device("mps")
    with pytest.raises(UserError, match="one device for 2 processes: use device=cuda"):
        device.pick_device("cuda:0", world_size=2)
    with pytest.raises(UserError, match="usable CUDA devices"):
        device.pick_device("cuda", local_rank=torch.cuda.device_count())


@pytest.mark.parametrize(
    "dtype, expected",
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_autocast_uses_the_dtype_of_the_option(dtype, expected):
    x = torch.ones(2, 2)
    with device.autocast(device.pick_device("cpu"), dtype, 64):
        assert (x @ x).dtype == expected


def test_peak_memory_of_a_cpu_is_that_of_the_process():
    x = torch.ones(2**24)
    assert x.nbytes < device.peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.parametrize(
    "features, n_embd, expected",
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile", 256, "bfloat16"),
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile", 255, "float32"),
        ("Features\t: fp asimd i8mm bf16", 768, "bfloat16"),
        ("flags\t\t: fpu avx2 avx512_bf16", 768, "float32"),
        ("", 768, "float32"),
    ],
)
def test_auto_is_bfloat16_for_wide_models_on_cpus_with_matrix_units(
    features, n_embd, expected, monkeypatch
):
    monkeypatch.setattr(device, "_cpuinfo", lambda: f"processor\t: 0\n{features}\n")
    assert device.matmul_dtype(torch.device("cpu"), "auto", n_embd) == expected


def test_gathered_weights_count_in_full(monkeypatch):
    """With zero1, 8 processes need 4 + 16/8 bytes per parameter each, with fsdp 16/8."""
    monkeypatch.setattr(device.os, "sysconf", lambda name: 1000)  # pages, and their size
    cpu = torch.device("cpu")
    device.check_memory(250_000, cpu, shards=8)
    device.check_memory(160_000, cpu, shards=8, gathered=True)
    with pytest.raises(UserError, match="8 processes.*several GPUs with --sharding=fsdp"):
        device.check_memory(250_000, cpu, shards=8, gathered=True)
    with pytest.raises(UserError, match="or use more processes"):
        device.check_memory(600_000, cpu, shards=8)
