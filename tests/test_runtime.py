"""Deterministic settings change what they should while they last; memory; the workers that compile kernels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cda_cli.errors import DeviceError
from cda_cli.runtime import CUBLAS_WORKSPACE, available_memory, deterministic
from tests.commands.helpers import environment, in_subprocess, real_text, run_cda
from tests.devices import DEVICES

TINY = (
    "model.seq_len=16", "model.dim=16", "model.depth=1", "model.heads=2", "optim.batch_size=2", "run.eval_batches=1",
)  # fmt: skip


def global_settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS_WORKSPACE),
    )


def test_nothing_changes_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    before = global_settings()
    with deterministic(False):
        assert global_settings() == before
    assert global_settings() == before


@pytest.mark.parametrize("warn_only", [False, True])
def test_settings_are_put_back(monkeypatch: pytest.MonkeyPatch, warn_only: bool) -> None:
    """Also after an error, and to what they were rather than to PyTorch's defaults."""
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def fail() -> None:
        assert global_settings() == (True, False, False, ":4096:8")
        raise RuntimeError("of another kind")

    torch.use_deterministic_algorithms(warn_only, warn_only=warn_only)
    try:
        with pytest.raises(RuntimeError, match=r"^of another kind$"), deterministic(True):
            fail()
        assert global_settings()[:3] == (warn_only, warn_only, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_has_no_deterministic_way_is_one_sentence() -> None:
    said = r"^this cannot be run with run.deterministic \(put_ .*\); set it to false$"
    with pytest.raises(DeviceError, match=said), deterministic(True):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set the variable would else have other bits and no word about it."""
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
    with pytest.raises(DeviceError, match="it is ':0:0'; unset it"), deterministic(True):
        pass


@pytest.mark.parametrize("device", DEVICES)
def test_the_setting_is_enough(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line: on a GPU every product fails where the variable was set too late for the process."""
    text = tmp_path / "text.txt"
    text.write_text(real_text(), encoding="utf-8")
    asked = [f"--set={setting}" for setting in (*TINY, "run.deterministic=true")]
    command = ("train", "--device", device, "--data", text, "--steps", 2, "--out", tmp_path / "run", *asked)
    monkeypatch.setenv("CDA_CACHE", str(tmp_path))
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    if device == "cpu":
        ended = run_cda(*command)
        assert ended.code == 0, ended.err
    else:
        done = subprocess.run(in_subprocess(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_memory_is_that_of_the_machine_or_of_the_control_group(tmp_path: Path) -> None:
    """In a container the machine's figure is not what the kernel allows."""
    assert available_memory(tmp_path) is None, "no /proc, as on macOS"
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == 8000 * 1024
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("5000\n")
    (tmp_path / "sys/fs/cgroup/a/memory.current").write_text("3000\n")
    (tmp_path / "sys/fs/cgroup/a/memory.stat").write_text("anon 1000\ninactive_file 500\n")
    assert available_memory(tmp_path) == 2500
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/\n3:memory:/c\n")
    (tmp_path / "sys/fs/cgroup/memory/c").mkdir(parents=True)
    for name, text in (("limit", "limit_in_bytes"), ("usage", "usage_in_bytes")):
        (tmp_path / f"sys/fs/cgroup/memory/c/memory.{text}").write_text("700\n" if name == "limit" else "200\n")
    (tmp_path / "sys/fs/cgroup/memory/c/memory.stat").write_text("total_inactive_file 100\n")
    assert available_memory(tmp_path) == 600


def test_a_signal_to_all_processes_of_a_job_leaves_the_compile_workers_alive() -> None:
    """Inductor waits for ever for a worker that was killed, so that a run would never answer the signal."""
    code = """
import os
from pathlib import Path
from cda_cli.runtime import start_compile_workers
start_compile_workers()
from torch._inductor.async_compile import AsyncCompile
pool = AsyncCompile.process_pool()
for process in ("self", pool.process.pid, pool.submit(os.getpid).result()):
    print(Path(f"/proc/{process}/status").read_text().partition("SigBlk:")[2].split()[0])
"""
    variables = environment(TORCHINDUCTOR_COMPILE_THREADS="2")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    here, *workers = (int(mask, 16) for mask in done.stdout.split())
    stops = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    assert here & stops == 0, "the run itself must hear the signals"
    assert [mask & stops for mask in workers] == [stops, stops]
