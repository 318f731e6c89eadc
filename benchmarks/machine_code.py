"""What a compiled kernel costs: registers, spilled bytes, shared memory, and the instructions for each score.

The last is of kernels of attention. It is read from the machine code of a loop over tiles: the instructions from its
first to the branch back to it, divided by the scores of which a thread makes the products there. What a branch inside
may leave out is counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton

from cda_cli.ops.triton.attention_launches import padded

# Matrix products that a kernel makes of each score. Every one takes D multiply-adds, for heads of D channels.
PRODUCTS = {
    "leader_kernel": 1, "leader_output_kernel": 2, "one_pass_kernel": 2, "solve_kernel": 1, "output_kernel": 2,
    "weighted_sum_kernel": 2, "query_kernel": 3, "key_value_kernel": 4, "in_turn_kernel": 5,
}  # fmt: skip
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
BRANCH = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)$")
# In PTX: any barrier, and that of all groups of warps.
BARRIER, ALL_GROUPS = re.compile(r"\b(?:bar|barrier)\.sync\b"), re.compile(r"\bbarrier\.sync\s+1;")
# A warpgroup's product of 64 × n × k, and a warp's product of 16 × 8 × k.
OF_GROUP, OF_WARP = re.compile(r"\bHGMMA\.64x(\d+)x(\d+)\."), re.compile(r"\bHMMA\.168(\d+)\.")


class Cost(NamedTuple):
    registers: int
    spilled: int
    shared: int
    per_score: float | None

    def columns(self) -> str:
        per_score = "–" if self.per_score is None else f"{self.per_score:.2f}"
        return f"{self.registers:9} {self.spilled:7} {self.shared:7} {per_score:>7}"


def cost(kernel: Any, specialization: str, made: Any, log: str) -> Cost:
    """Returns the cost of a kernel that was `made` by Triton for `specialization`, where ptxas said `log`."""
    assert not overwrites_results(made.asm["ptx"]), "arguments of groups of warps lie where results may still be read"
    numbers = re.search(r"(\d+) bytes spill stores.*Used (\d+) registers", log, re.DOTALL)
    assert numbers, f"ptxas says nothing of registers and spills: {log}"
    known = json.loads(specialization)
    places = zip(known["constant_keys"], known["constant_vals"], strict=True)
    constants = {kernel.arg_names[place]: value for (place,), value in places}
    per_score = instructions_per_score(kernel.fn.__name__, constants, made.asm["cubin"])
    return Cost(int(numbers[2]), int(numbers[1]), made.metadata.shared, per_score)


def overwrites_results(ptx: str) -> bool:
    """Whether a kernel writes the arguments of its groups of warps while a warp may still read shared memory.

    Each group starts behind a barrier of all groups, before which the arguments are written. What the warps have read
    until then must have a barrier of its own behind it.
    """
    start = ALL_GROUPS.search(ptx)
    if start is None:
        return False
    before = [barrier.end() for barrier in BARRIER.finditer(ptx, 0, start.start())]
    return "ld.shared" in ptx[before[-1] if before else 0 : start.start()]


def instructions_per_score(kernel: str, constants: Mapping[str, Any], cubin: bytes) -> float | None:
    """Returns the instructions that a thread executes for each of its scores in the cheapest loop over tiles.

    `constants` are those that the kernel was compiled with, D among them. Most tiles need no mask, and loops over those
    that do cost more. None for a kernel without such a loop, or without products of the matrix units.
    """
    if kernel not in PRODUCTS:
        return None
    products = PRODUCTS[kernel] + bool(constants.get("SPLIT"))
    code = _disassembled(cubin)
    place = {address: number for number, (address, _) in enumerate(code)}
    adds = [_multiply_adds(text) for _, text in code]
    loops = []
    for last, (_, text) in enumerate(code):
        branch = BRANCH.search(text)
        first = place[int(branch[1], 16)] if branch else last
        if any(adds[first:last]):
            loops.append((first, last))
    innermost = [loop for loop in loops if not any(loop != b and loop[0] <= b[0] <= b[1] <= loop[1] for b in loops)]
    work = products * padded(constants["D"])
    return min(((last - first + 1) * work / sum(adds[first:last]) for first, last in innermost), default=None)


def _disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """The instructions with their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), instruction.strip()) for address, instruction in INSTRUCTION.findall(text)]


def _multiply_adds(line: str) -> float:
    """Of a thread."""
    if found := OF_GROUP.search(line):
        return 64 * int(found[1]) * int(found[2]) / 128
    if found := OF_WARP.search(line):
        return 16 * 8 * int(found[1]) / 32
    return 0
