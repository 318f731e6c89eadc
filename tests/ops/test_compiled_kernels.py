"""Every kernel compiles to machine code, on a machine without a GPU too: `benchmarks/compile_kernels.py`, a few calls.

In a process of its own, since the tests of such a machine have Triton's interpreter on, which compiles nothing. It is
one process for all, since PyTorch takes seconds to import.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends.nvidia.compiler import get_ptxas

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
SOURCE = Path(__file__).parents[2] / "cda_cli" / "ops" / "triton"
# They multiply as many rows as Hopper's own products take, and read by its bulk copy engine.
WITH_MASK = (
    "leader_kernel",
    "leader_output_kernel",
    "solve_kernel",
    "output_kernel",
    "query_kernel",
    "key_value_kernel",
)
HOPPER_ONLY = {"one_pass_kernel", "weighted_sum_kernel", "in_turn_kernel", "delta_kernel", "grad_query_kernel"}
# Of their calls: a kernel for k ≤ 2 is causal on sm_80 and not causal on sm_90, and the other way round for any k, and
# the one that both have is that for k ≤ 2. So each is compiled for both architectures, and with a causal mask and
# without, in half of the time. All others ask for nothing that Hopper alone has, and compile for sm_80.
# `exact_forward_kernel` is compiled for the short rows of few queries.
CRASHING = "few_scores_kernel"
ONLY = (
    r"^(?!query_kernel .*any k|solve_kernel .*long|exact_forward_kernel .* rows)"
    r"(\w+ 80 (?!.*(not causal, k ≤ 2|, causal, any k))|"
    rf"({'|'.join((*WITH_MASK, *HOPPER_ONLY))}) 90 (?!.*(, causal, k ≤ 2|not causal, any k))|{CRASHING} 90 )"
)
ROW = re.compile(r"^\[\d+/\d+\] +(\w+) +(\d+) +(\d+) +(\d+) +(\d+) +(\S+) ", re.MULTILINE)
# The most instructions for each score, and the most bytes spilled, of the calls above on sm_90. The first are about a
# twentieth above those that Triton 3.6 and 3.7 make of the kernels.
MOST = {
    "leader_kernel": (2.9, 80),
    "leader_output_kernel": (6.6, 0),
    "one_pass_kernel": (12.7, 0),
    "solve_kernel": (9.9, 8),
    "output_kernel": (9.6, 0),
    "weighted_sum_kernel": (6.4, 0),
    "query_kernel": (10.4, 0),
    "key_value_kernel": (18.8, 140),
    "in_turn_kernel": (20.0, 40),
}
# Dies of one kernel for sm_90, and is Triton's own for the rest.
PTXAS = f"""#!/bin/sh
case "$*" in *sm_90*) grep -qs "entry {CRASHING}" -- "$@" && kill -SEGV $$ ;; esac
exec '%s' "$@"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The program, whose assembler crashes once."""
    ptxas = tmp_path_factory.mktemp("assembler") / "ptxas"
    ptxas.write_text(PTXAS % get_ptxas(90).path)
    ptxas.chmod(0o755)
    here = {"TRITON_INTERPRET": "0", "TRITON_PTXAS_PATH": str(ptxas), "PYTHONPATH": str(PROGRAM.parents[1])}
    command = [sys.executable, str(PROGRAM), "--quick", "--jobs", "1", "--only", ONLY]
    return subprocess.run(command, env=os.environ | here, capture_output=True, text=True, check=False)


def test_every_kernel_compiles(done: subprocess.CompletedProcess[str]) -> None:
    compiled = ROW.findall(done.stdout)
    kernels = {(kernel, arch) for kernel, arch, *_ in compiled}
    assert {kernel for kernel, arch in kernels if arch == "80"} == defined() - HOPPER_ONLY, done.stdout + done.stderr
    assert {kernel for kernel, arch in kernels if arch == "90"} == {*WITH_MASK, *HOPPER_ONLY}, done.stdout + done.stderr
    assert all(int(registers) > 0 for _, _, registers, *_ in compiled)
    for kernel in WITH_MASK:
        calls = [line for line in done.stdout.splitlines() if f"{kernel} " in line]
        assert {"not causal" in call for call in calls} == {True, False}, f"{kernel} with a causal mask and without"


def test_no_kernel_of_attention_executes_more_instructions_for_a_score(done: subprocess.CompletedProcess[str]) -> None:
    """A GPU is not at hand in most tests: a compiler or a change that makes a loop slower must show without one."""
    compiled = [row for row in ROW.findall(done.stdout) if row[1] == "90" and row[0] in MOST]
    assert {kernel for kernel, *_ in compiled} == set(MOST)
    for kernel, _, _, spilled, _, per_score in compiled:
        instructions, spills = MOST[kernel]
        assert float(per_score) <= instructions, f"{kernel}: {per_score} instructions a score"
        assert int(spilled) <= spills, f"{kernel} spills {spilled} bytes"


def test_groups_of_warps_start_behind_a_barrier() -> None:
    """Triton 3.7 has it by itself and 3.6 has not, so the machine code of most tests says nothing of it."""
    for path in SOURCE.glob("*.py"):
        for function in path.read_text().split("@gluon.jit")[1:]:
            before, starts, _ = function.partition("gl.warp_specialize(")
            assert not starts or "    barrier()\n" in before, f"{path.name}: no barrier before warp_specialize"


def test_a_compiler_that_crashes_is_told_and_fails(done: subprocess.CompletedProcess[str]) -> None:
    lines = done.stdout.splitlines()
    [told] = [number for number, line in enumerate(lines) if "does not compile: " in line]
    assert f"{CRASHING}  " in lines[told - 1], done.stdout
    assert "does not compile: PTXAS error: `ptxas` failed with error code -11" in lines[told]
    assert re.match(r"1 of \d+ do not compile$", lines[-1])
    assert done.returncode == 1


def defined() -> set[str]:
    """The names of all kernels in the source."""
    return {name for path in SOURCE.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
