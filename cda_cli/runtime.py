"""The machine: devices, precision, seeds, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from cda_cli.errors import CheckpointError, DeviceError
from cda_cli.plurals import counted
from cda_cli.settings import Dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # the values that NVIDIA names as deterministic


def pick_device(name: str) -> torch.device:
    """Returns the device: `auto` is the first GPU, or the CPU. Raises DeviceError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}; use auto, cpu, cuda, or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda, or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = counted(torch.cuda.device_count(), "GPU")
        raise DeviceError(f"this machine has no device {name!r} (PyTorch sees {found}); use --device cpu or auto")
    return device


def pick_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of the matrix products: `auto` is bf16 on a GPU that has it, and float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Within it, matrix products run in `dtype`, while the weights stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, if `wanted`, each operation always gives the same bits on one kind of device with one PyTorch.

    PyTorch then avoids code that adds in any order (attention of cuDNN, atomic sums in the backward of flash attention
    and of embeddings), and Inductor makes no choice by the clock. Our own kernels have no such sums. At the end
    PyTorch's settings are restored, but the environment variable of cuBLAS stays. Enter this before the first product
    on a GPU, when cuBLAS reads the variable.

    Raises DeviceError if the environment, or an operation within, does not allow it.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if workspace not in DETERMINISTIC_WORKSPACES:
        raise DeviceError(
            f"run.deterministic needs {CUBLAS_WORKSPACE} to be {' or '.join(DETERMINISTIC_WORKSPACES)}, and it is "
            f"{workspace!r}; unset it"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        said = str(error).strip().splitlines()[0].split(". ")[0]
        raise DeviceError(f"this cannot be run with run.deterministic ({said}); set it to false") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within it, PyTorch and MKL compute with `count` threads on a CPU, or with as many as before if it is None.

    The number is always set: otherwise MKL may take fewer threads than PyTorch while the machine is busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start_compile_workers() -> None:
    """Starts the processes in which Inductor compiles kernels for a GPU, with the signals of a stop blocked.

    `timeout`, systemd, batch systems and terminals signal all processes of a job. A run answers once its step is done,
    but Inductor waits for ever for a worker that was killed. The workers end with the run. A run that fails while they
    compile waits for what they have in hand.
    """
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # A new process inherits the mask.
    try:
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads

        if get_compile_threads() > 1:
            AsyncCompile.process_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies `tensor` to `device`, from pinned memory: other copies to a GPU wait for all work that is queued there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of the generators that dropout draws from, as uint8 tensors.

    It asks GPUs only if `device` is one: that starts CUDA, which takes memory there and fails in a forked process.
    """
    states = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        states[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Restores what `random_states` returned, but for devices that are not here. Raises CheckpointError."""
    try:
        torch.set_rng_state(states["cpu"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the random states of the checkpoint do not fit this PyTorch ({error}); use the version that saved them"
        ) from error


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch has held on a GPU, or that this process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def available_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still take: what the machine or its control group has left, if less.

    It is None where the system does not say (macOS). `root` is the folder that holds /proc and /sys.
    """
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        left = [1024 * int(fields["MemAvailable"].split()[0])]
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, KeyError, ValueError):
        return None
    for controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        names = (
            ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.lstrip("/")
        # A limit holds for the groups within it; in a container the mount is that of its own group.
        for folder in {group, *group.parents, mount}:
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in names)
                left.append(limit - used + _reclaimable(folder))
    return max(0, min(left))


def _reclaimable(group: Path) -> int:
    """Returns the bytes of cached files that a control group would give up."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({counted(torch.get_num_threads(), 'thread')})"
