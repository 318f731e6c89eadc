"""Every kernel compiles to machine code, on a machine without a GPU too: `benchmarks/compile_kernels.py`, a few calls.

In a process of its own, since the tests of such a machine have Triton's interpreter on, which compiles nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
# Of the calls of attention: a kernel for k ≤ 2 is causal on sm_80 and not causal on sm_90, and the other way round for
# any k, and the one that both have is that for k ≤ 2. So each kernel is compiled for both architectures, and with a
# causal mask and without, in half of the time. `exact_forward_kernel` is compiled for the short rows of few queries.
HALF = (
    r"^(?!query_kernel .*any k|exact_forward_kernel .* rows)"
    r"\w+ (80 (?!.*(not causal, k ≤ 2|, causal, any k))|90 (?!.*(, causal, k ≤ 2|not causal, any k)))"
)
ROW = re.compile(r"^\[\d+/\d+\] +(\w+) +(\d+) +(\d+) +(\d+) +(\d+) ", re.MULTILINE)
WITH_MASK = (
    "leader_kernel",
    "leader_output_kernel",
    "solve_kernel",
    "output_kernel",
    "query_kernel",
    "key_value_kernel",
)


def compile_kernels(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(PROGRAM.parents[1]), **variables}
    command = [sys.executable, str(PROGRAM), "--quick", "--jobs", "1", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_compiles() -> None:
    done = compile_kernels("--only", HALF)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = ROW.findall(done.stdout)
    kernels = {(kernel, arch) for kernel, arch, *_ in compiled}
    assert {kernel for kernel, _ in kernels} == defined()
    assert len(kernels) == 2 * len(defined()), "each for both architectures"
    assert all(int(registers) > 0 for _, _, registers, *_ in compiled)
    for kernel in WITH_MASK:
        calls = [line for line in done.stdout.splitlines() if f"{kernel} " in line]
        assert {"not causal" in call for call in calls} == {True, False}, f"{kernel} with a causal mask and without"


def test_a_compiler_that_crashes_is_told_and_fails(tmp_path: Path) -> None:
    """ptxas in the place of Triton's own: it says its version, and dies of the rest."""
    ptxas = tmp_path / "ptxas"
    ptxas.write_text('#!/bin/sh\n[ "$1" = --version ] || kill -SEGV $$\necho "release 12.8, V12.8.93"\n')
    ptxas.chmod(0o755)
    done = compile_kernels("--arch", "90", "--only", "few_scores", TRITON_PTXAS_PATH=str(ptxas))
    assert "does not compile: PTXAS error: `ptxas` failed with error code -11" in done.stdout, done.stdout + done.stderr
    assert "1 of 1 do not compile" in done.stdout
    assert done.returncode == 1


def defined() -> set[str]:
    """The names of all kernels in the source."""
    folder = PROGRAM.parents[1] / "cda_cli" / "ops" / "triton"
    return {name for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
