"""The device that a script runs on: selection, precision, peak FLOP/s and memory."""

import contextlib
import os
import platform
import re
import sys
import weakref
from pathlib import Path

import torch

from stagewise.errors import UserError

# Dense bf16 peak in FLOP/s by words in the device name, more specific entries first. From the
# vendors' data sheets, without sparsity; the choice of entries follows torchtitan and nanochat.
PEAK_FLOPS = [
    (("gb200",), 2.5e15),
    (("b200",), 2.25e15),
    (("h200", "nvl"), 836e12),
    (("h200",), 989e12),
    (("h100", "nvl"), 835e12),
    (("h100", "pcie"), 756e12),
    (("h100",), 989e12),
    (("h800",), 989e12),
    (("gh200",), 989e12),
    (("a100",), 312e12),
    (("a800",), 312e12),
    (("a40",), 149.7e12),
    (("a30",), 165e12),
    (("a10g",), 70e12),
    (("a10",), 125e12),
    (("l40s",), 362e12),
    (("l40",), 181e12),
    (("l4",), 121e12),
    (("5090",), 209.5e12),
    (("4090",), 165.2e12),
    (("3090",), 71e12),
    (("mi355",), 2.5e15),
    (("mi325",), 1.3074e15),
    (("mi300x",), 1.3074e15),
    (("mi250x",), 383e12),
    (("mi250",), 362.1e12),
]


def pick_device(device: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """Return the torch device selected by the option `device`.

    "auto" is CUDA if available, otherwise the CPU. Under torchrun, each rank uses its own GPU.

    Raises:
        UserError: if the device is unknown or unavailable, or is a single GPU for several
            processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is unknown: use auto, cpu, cuda or cuda:N") from None
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f"device={device!r} is not supported: use auto, cpu, cuda or cuda:N")
    if picked.index is not None and world_size > 1:
        raise UserError(
            f"device={device!r} is one device for {world_size} processes: use device={picked.type}"
        )
    if picked.type == "cuda":
        n = torch.cuda.device_count()
        index = local_rank if picked.index is None else picked.index
        if index >= n:
            raise UserError(
                f"device={device!r}, local rank {local_rank}: this machine has {n} usable CUDA "
                "devices; start fewer processes per machine, or use device=cpu"
            )
        picked = torch.device("cuda", index)
        torch.cuda.set_device(picked)
    return picked


def use_deterministic_kernels() -> None:
    """Make GPU results reproducible bit for bit.

    Must be called before the first matrix product. Operations without a deterministic kernel raise
    an error.
    """
    # Required by cuBLAS, see torch's notes on reproducibility.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


# Narrower models are faster in float32 on CPUs with bf16 matrix units: a matrix product does not
# outweigh the conversions. Measured on a CPU with AMX (docs/speed.md).
MIN_WIDTH_BF16 = 256


def matmul_dtype(device: torch.device, dtype: str, n_embd: int) -> str:
    """Return the dtype of matrix products, "bfloat16" or "float32", for the option `dtype`.

    "auto" is bfloat16 on GPUs with compute capability 8.0 or higher, and on CPUs with bf16 matrix
    units (Intel's AMX, Arm's BFMMLA) if the model is at least `MIN_WIDTH_BF16` wide. Otherwise it
    is float32. float16 is not supported, because it requires loss scaling.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        gains = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        gains = n_embd >= MIN_WIDTH_BF16 and not _cpu_features().isdisjoint({"amx_bf16", "bf16"})
    return "bfloat16" if gains else "float32"


def _cpu_features():
    """Return the features of the processor as Linux names them ("bf16" is Arm's)."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return set(lines[0].split()) if lines else set()


def autocast(device: torch.device, dtype: str, n_embd: int) -> torch.autocast:
    """Return the autocast context for the option `dtype`; see `matmul_dtype`."""
    bf16 = matmul_dtype(device, dtype, n_embd) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def check_memory(
    parameters: int, device: torch.device, shards: int = 1, gathered: bool = False
) -> None:
    """Check that the training state fits into memory: weights, gradients and AdamW's two moments.

    They need 16 bytes per parameter, divided by the number of processes over which they are
    sharded. If all weights are gathered during a step, they need 4 bytes more. Activations, which
    depend on batch_size, are not included.

    Raises:
        UserError: if it does not fit.
    """
    needed = 16 * parameters / shards + 4 * parameters * gathered
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, ValueError):  # no limit: "max"
            available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if needed > available:
        more = shards > 1 and not gathered
        raise UserError(
            f"a model of {parameters:,} parameters needs {needed / 2**30:,.1f} GiB for weights, "
            f"gradients and optimizer state"
            + (f" in each of {shards} processes" if shards > 1 else "")
            + f", but {device} has {available / 2**30:,.1f} GiB: lower n_layer or n_embd, or use "
            f"{'more processes' if more else 'several GPUs with --sharding=fsdp'}"
        )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def machine_name(device_name: str, world_size: int, cpu: str, threads: int) -> str:
    """Return the hardware in words, for example "8 x NVIDIA H100" or "1 thread of 2 x AMD EPYC"."""
    if device_name != "cpu":
        return f"{world_size} x {device_name}"
    threads *= world_size
    return f"{threads} thread{'s' * (threads > 1)} of {cpu}"


def cpu_name() -> str:
    """Return the number of cores and the model of the processor, as Linux reports them."""
    models = re.findall(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return f"{os.cpu_count()} x {models[0] if models else platform.machine()}"


def _cpuinfo():
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of the device in FLOP/s, or None if it is not in the table."""
    return _peak_of(device_name(device))


def _peak_of(name):
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((peak for parts, peak in PEAK_FLOPS if words.issuperset(parts)), None)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes since the last reset.

    On a GPU, this is the memory allocated by PyTorch. On a CPU, it is the resident set size of the
    process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else 0


def pin(tensor: torch.Tensor) -> None:
    """Pin the memory of a CPU tensor for as long as the tensor exists.

    Unlike this, `torch.empty(..., pin_memory=True)` rounds sizes up to powers of two.
    """
    cudart, address = torch.cuda.cudart(), tensor.data_ptr()
    torch.cuda.check_error(int(cudart.cudaHostRegister(address, tensor.nbytes, 0)))
    weakref.finalize(tensor, cudart.cudaHostUnregister, address).atexit = False


def compile_seconds() -> float:
    """Return the time that torch.compile has spent in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds
    times = utils.compilation_time_metrics if utils else {}
    return sum(times.get("_compile.compile_inner", ()))


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # If this is not permitted, the peak is that of the process so far.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
