"""Compile every kernel that a call of the operator can select, on a machine without a GPU.

    python benchmarks/compile_kernels.py [--arch 80 90] [--only REGEX] [--quick] [--jobs N]

The calls are made as they are, on small tensors of the CPU, under a driver that names the architecture and launches
nothing: Triton hands over what it would compile for each launch, so tiles, warps and stages are those of the launching
code. Each kernel is then compiled once to machine code and printed with the first call that selects it: its registers
per thread, the bytes that it spills, its shared memory, and of attention the instructions that it executes for each
score (`machine_code.py`). Exit code 1 if one does not compile, or would not launch because it needs more shared memory
than the architecture has.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
import triton
from machine_code import Cost, cost
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from cda_cli.ops.backends.triton_kernels import WIDEST_HEAD
from cda_cli.ops.decoding import MOST_QUERIES, DecodingInputs
from cda_cli.ops.decoding_step import HeadBudgets
from cda_cli.ops.largest import LONGEST_ROW
from cda_cli.ops.solve_spec import SolveSpec
from cda_cli.ops.triton import attention_launches, decoding_launches, fused_attention, heads_launches, row_launches
from cda_cli.ops.triton.fused_attention import FEW_QUERIES
from cda_cli.ops.triton.step_launches import add_and_norm, draw_token, heads_of_step, routed_blocks

# Bytes of shared memory that a program may have, by architecture (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (16, 32, 40, 64, 80, 96, 128, 192, WIDEST_HEAD)
# How queries, keys and values lie in memory: key heads shared by two query heads each; key heads expanded, which the
# bulk copy engine cannot read; rows that start anywhere; as many keys as the kernels in Gluon take.
MEMORY = ("whole", "grouped", "expanded", "unaligned", "long")
SHARING = (1, 8, 64)  # query heads of a key head, in decoding
LENGTH = 64  # of the texts: no kernel is compiled for a length


class Variant(NamedTuple):
    """A kernel as Triton would compile it; `call` is the first that selects it."""

    arch: int
    module: str
    kernel: str
    call: str
    specialization: str  # JSON, of Triton


class Result(NamedTuple):
    variant: Variant
    cost: Cost | None
    failure: str
    seconds: float


class Driver:
    """What Triton asks of a driver up to a launch."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch  # for which Triton keeps its compiled kernels apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


Call = tuple[str, Callable[[], None]]
Axes = tuple[tuple[Any, ...], ...]


def attention_calls(quick: bool) -> Iterator[Call]:
    axes: Axes = (DTYPES, WIDTHS, MEMORY, (True, False), (False, True), (True, False), (True, False))
    if quick:
        axes = (DTYPES[:1], (64,), MEMORY[:1], (True, False), (False,), (True, False), (True,))
        yield "long, not causal, k ≤ 2", lambda: attend(*_inputs(DTYPES[0], 128, "long"), False, False, True, True)
        yield "long, causal, any k", lambda: attend(*_inputs(DTYPES[0], 128, "long"), True, False, False, False)
    for dtype, width, memory, causal, packed, at_most_two, trained in itertools.product(*axes):
        words = (
            f"{_name(dtype)} D={width}", memory, "causal" if causal else "not causal", "documents" if packed else "",
            "k ≤ 2" if at_most_two else "any k", "trained" if trained else "",
        )  # fmt: skip
        inputs = _inputs(dtype, width, memory)
        yield _words(words), functools.partial(attend, *inputs, causal, packed, at_most_two, trained)


def few_queries_calls(quick: bool) -> Iterator[Call]:
    axes: Axes = (DTYPES, WIDTHS, SHARING, (1, FEW_QUERIES), (True, False), (False, True))
    if quick:
        axes = (DTYPES[:1], (64,), SHARING[:1], (1,), (True,), (False,))
    for dtype, width, sharing, T, causal, packed in itertools.product(*axes):
        words = (
            f"{_name(dtype)} D={width}", f"queries: {T}", f"heads of a key head: {sharing}",
            "causal" if causal else "not causal", "documents" if packed else "",
        )  # fmt: skip
        query = torch.zeros(1, sharing, T, width, dtype=dtype)
        key = torch.zeros(1, 1, LENGTH, width, dtype=dtype)
        yield _words(words), functools.partial(attend, query, key, key, causal, packed, False, False)


def decoding_calls(quick: bool) -> Iterator[Call]:
    """Decoding over a cache, by the number of scores that a split keeps, and of the splits."""
    caches = ((LENGTH, False), (32 * LENGTH, True))
    axes: Axes = (DTYPES, WIDTHS, ((1, 1), (8, MOST_QUERIES)), (1, 2, 3, 5, 9, 16), caches)
    if quick:
        axes = (DTYPES[:1], (64,), ((1, 1),), (2, 3), ((LENGTH, True),))
    for dtype, width, (sharing, T), k, (length, of_each) in itertools.product(*axes):
        words = (
            f"{_name(dtype)} D={width}", f"a cache of {length}", f"queries: {T}", f"heads of a key head: {sharing}",
            f"k ≤ {k}", "a length and k of each" if of_each else "",
        )  # fmt: skip
        query, key = torch.zeros(1, sharing, T, width, dtype=dtype), torch.zeros(1, 1, length, width, dtype=dtype)
        lengths, budget = (torch.ones(1).long(), torch.ones(1, sharing, T)) if of_each else (None, float(k))
        inputs = DecodingInputs(query, key, key, lengths, budget, k, SolveSpec("exact", 0.1), 1.0)
        yield _words(words), functools.partial(decode, inputs)


def iterative_decoding_calls(quick: bool) -> Iterator[Call]:
    """Decoding with the iterative solver, over short caches and the longest one, by few heads and by many."""
    longest = decoding_launches.LONGEST_ROW
    caches = ((LENGTH, 2, True),) if quick else ((LENGTH, 2, False), (longest, 2, True), (longest, 8, True))
    axes: Axes = (DTYPES[:1], (64,), caches) if quick else (DTYPES, WIDTHS, caches)
    for dtype, width, (length, heads, of_each) in itertools.product(*axes):
        words = (
            f"{_name(dtype)} D={width}", f"a cache of {length}", f"heads: {heads}",
            "a length and k of each" if of_each else "",
        )  # fmt: skip
        query, key = torch.zeros(1, heads, 1, width, dtype=dtype), torch.zeros(1, 1, length, width, dtype=dtype)
        lengths, budget = (torch.ones(1).long(), torch.ones(1, heads, 1)) if of_each else (None, 2.0)
        inputs = DecodingInputs(query, key, key, lengths, budget, None, SolveSpec("iterative", 0.1, 25, 4.0, 0.7), 1.0)
        yield _words(words), functools.partial(decode_iterative, inputs)


def row_calls(quick: bool) -> Iterator[Call]:
    """Rows of every block, as long as it and shorter, and rows in parts."""
    blocks = [2048] if quick else [2**power for power in range(row_launches.REGISTER_LIMIT.bit_length())]
    shapes = [(32, block) for block in blocks] + [(2, 2 * row_launches.REGISTER_LIMIT)]
    if not quick:
        shapes += [(33, block - 1) for block in blocks if block > 1] + [(3, row_launches.REGISTER_LIMIT + 1)]
    for dtype, (R, n), solve in itertools.product(
        DTYPES[:1] if quick else DTYPES, shapes, (exact_rows, iterative_rows)
    ):
        yield f"{_name(dtype)} rows: {R} × {n}", functools.partial(solve, torch.zeros(R, n, dtype=dtype))


def selection_calls(quick: bool) -> Iterator[Call]:
    """The largest entries of rows of every block, as long as it and shorter."""
    blocks = [1024] if quick else [2**power for power in range(1, LONGEST_ROW.bit_length())]
    shapes = [(32, block) for block in blocks] + [(33, block - 1) for block in blocks[1:] if not quick]
    for dtype, (R, n) in itertools.product(DTYPES[:1] if quick else DTYPES, shapes):
        yield f"{_name(dtype)} rows: {R} × {n}", functools.partial(select, torch.zeros(R, n, dtype=dtype))


def heads_calls(quick: bool) -> Iterator[Call]:
    axes: Axes = (DTYPES[:1], (64,), (0,), (1,)) if quick else (DTYPES, WIDTHS, (0, 2), (1, 2))
    for dtype, width, rest, sharing in itertools.product(*axes):
        words = f"{_name(dtype)} D={width}", "more is projected" if rest else "", "grouped" if sharing > 1 else ""
        K = 4 // sharing
        projected = torch.zeros(1, LENGTH, 4 + 2 * K + rest, width, dtype=dtype)
        yield _words(words), functools.partial(norm_and_rotate, projected, K)


def step_calls(quick: bool) -> Iterator[Call]:
    """The heads of a step of decoding, and a norm with the sum before it."""
    axes: Axes = (DTYPES[:1], (64,), (True,)) if quick else (DTYPES, WIDTHS, (True, False))
    for dtype, width, normed in itertools.product(*axes):
        words = f"{_name(dtype)} D={width}", "norms, rotation and k" if normed else ""
        yield _words(words), functools.partial(step, torch.zeros(1, 4, width, dtype=dtype), normed)


def routed_calls(quick: bool) -> Iterator[Call]:
    """A feed-forward of routed blocks: of presets, with a bias and a count, and of sizes that divide nothing."""
    axes: Axes = (DTYPES[:1], ((512, 32, 64),), (True,)) if quick else (
        DTYPES, ((512, 32, 64), (768, 48, 64), (4096, 224, 64), (36, 5, 7)), (True, False)
    )  # fmt: skip
    for dtype, (width, blocks, size), counts in itertools.product(*axes):
        words = f"{_name(dtype)} C={width}", f"blocks: {blocks} × {size}", "bias and count" if counts else ""
        yield _words(words), functools.partial(route, dtype, width, blocks, size, counts)


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, packed: bool, at_most_two: bool, trained: bool
) -> None:
    budget = 1.0 if trained else torch.ones(query.shape[:3])  # The kernels for a number are others.
    documents = torch.zeros(1, key.shape[2], dtype=torch.long) if packed else None
    leaf = query.requires_grad_(trained)
    others = documents, 0.1, 1.0, causal, at_most_two, trained
    output, _ = fused_attention.attend(leaf, key, value, budget, *others)
    if trained:
        torch.autograd.grad(output, leaf, torch.zeros_like(output))


def decode(inputs: DecodingInputs) -> None:
    decoding_launches.decode(inputs)


def decode_iterative(inputs: DecodingInputs) -> None:
    decoding_launches.decode_iterative(inputs)


def exact_rows(scores: Tensor) -> None:
    _, saved = row_launches.exact_forward(scores, torch.ones(scores.shape[0]), 0.1)
    row_launches.exact_backward(scores, scores, saved, 0.1)


def iterative_rows(scores: Tensor) -> None:
    budget = torch.ones(scores.shape[0])
    with torch.inference_mode():
        row_launches.iterative_forward(scores, budget, (1.0, 0.1), 0.1)
    _, history = row_launches.iterative_forward(scores, budget, (1.0, 0.1), 0.1)
    row_launches.iterative_backward(scores, scores, budget, history, (1.0, 0.1), 0.1)


def select(scores: Tensor) -> None:
    row_launches.largest_entries(scores, 1)


def norm_and_rotate(projected: Tensor, key_heads: int) -> None:
    gain, angles = torch.ones(projected.shape[-1]), torch.zeros(projected.shape[1], projected.shape[-1])
    outputs = heads_launches.norm_and_rotate(projected.requires_grad_(), gain, gain, angles, angles, 4, key_heads, 1e-6)
    torch.autograd.grad(outputs, projected, [torch.zeros_like(output) for output in outputs])


def step(projected: Tensor, normed: bool) -> None:
    keys = torch.zeros(1, 1, LENGTH, projected.shape[-1], dtype=projected.dtype)
    gain, angles, x = torch.ones(projected.shape[-1]), torch.zeros(LENGTH, projected.shape[-1]), projected.flatten(1)
    others: dict[str, Any] = {}
    if normed:
        others = {"gains": (gain, gain), "tables": (angles, angles), "budgets": HeadBudgets(gain, 2.0)}
    settings: dict[str, Any] = {"gains": None, "eps": 0.0, "tables": None, "query_scale": None, "budgets": None}
    heads_of_step(projected, keys, keys, torch.ones(1).long(), 1, null_keys=1, **settings | others)
    draw_token(x, gain[:1].double(), gain[:1] > 0, gain[None].double(), torch.ones(1).long())
    add_and_norm(x.float(), x if normed else None, x[0], x[0], 1e-6, normed, projected.dtype)


def route(dtype: torch.dtype, width: int, blocks: int, size: int, counts: bool) -> None:
    x, factors = torch.zeros(1, width, dtype=dtype), torch.zeros(1, blocks, dtype=dtype)
    up, down = torch.zeros(blocks * size, width, dtype=dtype), torch.zeros(width, blocks * size, dtype=dtype)
    biases = (up[:, 0].contiguous(), x[0]) if counts else (None, None)
    read = torch.zeros(2, dtype=torch.int64) if counts else None
    routed_blocks(x, factors, up, biases[0], down, biases[1], tolerance=1e-3, dtype=dtype, read=read)


def _inputs(dtype: torch.dtype, width: int, memory: str) -> tuple[Tensor, Tensor, Tensor]:
    """query [1, 4, length, width], key and value, new ones."""
    least = attention_launches.IN_TURN_LENGTHS, attention_launches.OUTPUT_KEYS, attention_launches.SPLIT_KEYS
    longest = max(attention_launches.ONE_PASS_KEYS, *(keys for lengths in least for keys in lengths.values()))
    length, G = longest if memory == "long" else LENGTH, 2 if memory == "grouped" else 4
    query, key, value = (torch.zeros(1, n, length, width + 1, dtype=dtype) for n in (4, G, G))
    if memory == "unaligned":
        return query[..., 1:], key[..., 1:], value[..., 1:]
    query, key, value = (x[..., :-1].contiguous() for x in (query, key, value))
    if memory == "expanded":
        key, value = (x[:, :1].expand(-1, G, -1, -1) for x in (key, value))
    return query, key, value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(words: tuple[str, ...]) -> str:
    return ", ".join(word for word in words if word)


def selected(arch: int, quick: bool) -> list[Variant]:
    """What the calls would have Triton compile for `arch`, each once."""
    found: dict[tuple[str, str, str], Variant] = {}
    triton.runtime.driver.set_active(Driver(arch))
    # They remember whether another architecture has the bulk copy engine.
    for launches in ("one_pass", "leader_and_output", "solve_and_output", "backward", "backward_in_turn"):
        getattr(attention_launches, launches).cache_clear()
    for calls in (
        attention_calls, few_queries_calls, decoding_calls, iterative_decoding_calls, row_calls, selection_calls,
        heads_calls, step_calls, routed_calls,
    ):  # fmt: skip
        for words, call in calls(quick):
            triton.knobs.runtime.jit_cache_hook = functools.partial(_note, found, arch, words)
            call()
    return list(found.values())


def _note(
    found: dict[tuple[str, str, str], Variant], arch: int, call: str, *, key: str, fn: Any, compile: dict[str, Any],
    **_: Any,
) -> bool:  # fmt: skip
    """Triton's hook before it compiles; True: it neither compiles nor launches."""
    variant = Variant(arch, fn.module, fn.name, call, compile["specialization_data"])
    found.setdefault((fn.module, fn.name, key), variant)
    return True


def compiled(variant: Variant) -> Cost:
    """In a process of its own: a compiler that crashes takes its process along."""
    triton.runtime.driver.set_active(Driver(variant.arch))
    triton.knobs.nvidia.dump_ptxas_log = True
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
        triton.knobs.cache.dir = folder  # nothing that was compiled before
        made = kernel.preload(variant.specialization)
    return cost(kernel, variant.specialization, made, log.getvalue())


workers = threading.local()


def result(variant: Variant) -> Result:
    started = time.perf_counter()
    if not hasattr(workers, "own"):
        workers.own = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    future = workers.own.submit(compiled, variant)
    error, found, failure = future.exception(), None, ""
    if isinstance(error, BrokenProcessPool):
        del workers.own
        failure = "the compiler ended its process"
    elif error is not None:
        failure = str(error).partition("\n")[0] or type(error).__name__
    else:
        found = future.result()
        if found.shared > SHARED[variant.arch]:
            failure = f"does not fit: {SHARED[variant.arch]} bytes of shared memory"
    return Result(variant, found, failure, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=SHARED, default=[80, 90], help="of compute capability × 10"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of KERNEL ARCHITECTURE CALL, as they are printed")
    parser.add_argument("--quick", action="store_true", help="few calls, which select each kernel")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at work")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("Triton's interpreter compiles nothing; unset TRITON_INTERPRET")
    variants = [
        variant
        for arch in arguments.arch
        for variant in selected(arch, arguments.quick)
        if re.search(arguments.only, f"{variant.kernel} {variant.arch} {variant.call}")
    ]
    tools = ", ".join(f"sm_{arch}: ptxas {get_ptxas(arch).version}" for arch in arguments.arch)
    print(f"triton {triton.__version__}; {tools}; {len(variants)} kernels")
    print(
        f"{'':11} {'kernel':30} sm_ registers spilled  shared a score  s    warps, and the first call that selects it"
    )
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as threads:
        for number, (variant, found, failure, seconds) in enumerate(threads.map(result, variants), 1):
            place = f"[{number}/{len(variants)}]"
            numbers = found.columns() if found else f"{'':33}"
            warps = json.loads(variant.specialization)["options"]["num_warps"]
            print(
                f"{place:11} {variant.kernel:30}  {variant.arch} {numbers} {seconds:4.1f} {warps:2}, {variant.call}",
                flush=True,
            )
            if failure:
                failed += 1
                print(f"{'':12}^ does not compile: {failure}", flush=True)
    print(f"{failed} of {len(variants)} do not compile")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
