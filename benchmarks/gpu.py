"""Measures speed on this GPU: of the row operator and of attention, each beside its alternatives.

    make bench-gpu

Every table is one run. Times are medians of CUDA graphs on the device, so they contain no time of the host. The
published operator and the package `adasplash`, which is timed if it is installed, cannot be captured;
`triton.testing.do_bench` times them. The table `eager` is about the host: it times calls as the user of a library makes
them. `python benchmarks/gpu.py rows` (or attention, eager, decoding, adasplash) makes that table only.
benchmarks/results/ has the tables of earlier runs.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from synthetic import header, on_gpu, row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench, do_bench_cudagraph

from cda_cli.ops import decode_attention, soft_topk, soft_topk_attention

GPU = torch.device("cuda")
EPS = 0.1
PUBLISHED_ITERATIONS = 25
ROWS = ((16384, 2048, 128.0), (65536, 1024, 2.0), (512, 131072, 128.0))
SHAPES = (
    (8, 8, 1024, 64),
    (4, 8, 4096, 64),
    (2, 8, 8192, 64),
    (1, 8, 32768, 64),
    (2, 8, 8192, 128),
    (1, 8, 65536, 128),
)
PUBLISHED_SHAPES = SHAPES[:2]
EAGER_SHAPES = ((8, 12, 2048, 64), (3, 12, 1536, 80))
EAGER_ROUNDS, EAGER_WARMUP = 100, 20
GRAPH_ROUNDS, GRAPH_MS = 15, 2.0
SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CACHES = (
    (4, 8, 16384, 64),
    (1, 16, 32768, 128),
    (64, 12, 1024, 64),
    (1, 8, 65536, 128),
    (1, 12, 1024, 64),
)
DECODED_BUDGETS = (1.0, 2.0, 8.0)


def main(wanted: Sequence[str]) -> None:
    # The last one takes longest: AdaSplash-2 compiles 30 settings of each kernel for each shape.
    tables = {
        "rows": rows_table,
        "attention": attention_table,
        "eager": eager_table,
        "decoding": decoding_table,
        "adasplash": adasplash_table,
    }
    names = on_gpu(wanted, tables)
    for name in names:
        tables[name]()


def median(function: Callable[[], object], captured: bool = True) -> float:
    """Returns the median of the milliseconds."""
    if not captured:
        return do_bench(function, warmup=10, rep=50, return_mode="median")
    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(function, rep=20, return_mode="median")


def forward_and_both(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], captured: bool = True
) -> tuple[float, float]:
    """Returns the milliseconds of `passes`."""
    forward, both = passes(function, inputs)
    return median(forward, captured), median(both, captured)


def passes(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns the forward without gradients, and forward and backward."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return forward, lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def forward_and_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], captured: bool = True
) -> tuple[float, float]:
    forward, both = forward_and_both(function, inputs, captured)
    return forward, both - forward


def rows_table() -> None:
    header("The row operator, milliseconds (ε = 0.1)", "rows × n, k, dtype", "read + write", "softmax", "softmax ∂",
           "exact", "exact ∂", "iterative 25", "iterative 25 ∂", "colt5 25", "colt5 25 ∂", "exact, memory")  # fmt: skip
    for R, n, k in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            scores = torch.randn(R, n, device=GPU).to(dtype)
            target = scores.clone()

            def iterative(s: Tensor, backend: Any, k: float = k) -> Tensor:
                return soft_topk(s, k, eps=EPS, solver="iterative", n_iters=PUBLISHED_ITERATIONS, backend=backend)

            times = [median(lambda target=target, scores=scores: target.copy_(scores))]  # type: ignore[misc]
            times += forward_and_backward(lambda s: torch.softmax(s, -1), [scores])
            times += forward_and_backward(lambda s, k=k: soft_topk(s, k, eps=EPS), [scores])
            times += forward_and_backward(lambda s: iterative(s, "auto"), [scores])
            colt5: tuple[object, object] = ("–", "–")
            if dtype == torch.float32 and n <= 2048:
                colt5 = forward_and_backward(lambda s, k=k: published_rows(s, k), [scores], captured=False)
            extra = peak_memory(lambda scores=scores, k=k: soft_topk(scores, k, eps=EPS))  # type: ignore[misc]
            copies = f"{extra / scores.nbytes:.2f} × input"
            row(f"{R} × {n}, k = {k:g}, {str(dtype)[6:]}", *times, *colt5, copies)


def published_rows(scores: Tensor, k: float) -> Tensor:
    from colt5_attention.triton_coor_descent import triton_coor_descent

    budget = torch.full(scores.shape[:-1], k, device=scores.device)
    return triton_coor_descent(
        scores, n_iters=PUBLISHED_ITERATIONS, k=budget, eps=EPS, eps_init=4.0, eps_decay=0.7, checkpoint_segments=5
    )


def peak_memory(function: Callable[[], object]) -> int:
    """Returns the peak of allocated bytes above those allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def published_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published pipeline, patched to run, in float32: scores, the published operator, product with the values."""
    query, key, value = query.float(), key.float(), value.float()
    scores = query.shape[-1] ** -0.5 * query @ key.transpose(-1, -2)
    T = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=GPU).triu(1), -torch.finfo(scores.dtype).max)
    return published_rows(scores.flatten(0, 2), 2.0).view(scores.shape) @ value


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=GPU, dtype=torch.bfloat16)


def with_backend(backend: SDPBackend, causal: bool = True) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return run


def ours(k: float) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return soft_topk_attention(query, key, value, k, eps=EPS)

    return run


def attention_table() -> None:
    """The ways take turns, so that what the GPU's clock does falls on all of them."""
    ways: dict[str, Callable[..., Tensor]] = {
        "SDPA cuDNN": with_backend(SDPA["cuDNN"]),
        "SDPA flash": with_backend(SDPA["flash"]),
        "k = 2": ours(2.0),
        "k = 8": ours(8.0),
        "k = 64": ours(64.0),
    }
    header("Causal attention, bf16, normal q, k, v, ε = 0.1: forward / forward + backward, ms; memory of both",
           "B,H,T,D", *ways, "k = 2 / cuDNN", "published", "memory, k = 2 / flash")  # fmt: skip
    for shape in SHAPES:
        inputs = [normal(*shape) for _ in range(3)]
        names = [name for name in ways if name != "k = 64" or shape[2] <= 8192]
        forwards, boths = zip(*(passes(ways[name], inputs) for name in names), strict=True)
        times = dict(zip(names, zip(in_turn(forwards), in_turn(boths), strict=True), strict=True))
        ratios = [f"{mine / theirs:.2f}" for mine, theirs in zip(times["k = 2"], times["SDPA cuDNN"], strict=True)]
        cells = ["{:.3f} / {:.3f}".format(*times[name]) if name in times else "–" for name in ways]
        published = attention_cell(published_attention, inputs) if shape in PUBLISHED_SHAPES else "–"
        memory = [training_memory(ways[name], inputs) for name in ("k = 2", "SDPA flash")]
        row(",".join(map(str, shape)), *cells, " / ".join(ratios), published, f"{memory[0] / memory[1]:.2f}")


def in_turn(functions: Sequence[Callable[[], object]]) -> list[float]:
    """Returns the median of the milliseconds of each function, as a CUDA graph, of which each replay has some calls."""
    graphs = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for function in functions:
            calls = max(1, round(GRAPH_MS / do_bench_cudagraph(function, rep=5, return_mode="median")))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    function()
            graphs.append((graph, calls))
        times: list[list[float]] = [[] for _ in functions]
        for _ in range(GRAPH_ROUNDS):
            for (graph, calls), kept in zip(graphs, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                kept.append(start.elapsed_time(end) / calls)
    return [statistics.median(kept) for kept in times]


def attention_cell(way: Callable[..., Tensor], inputs: Sequence[Tensor]) -> str:
    """Times what cannot be captured."""
    try:
        forward, both = forward_and_both(way, inputs, captured=False)
    except Exception as error:  # noqa: BLE001 - another library's limit is a cell of the table
        return type(error).__name__
    return f"{forward:.3f} / {both:.3f}"


def eager_table() -> None:
    """The ways take turns, so that what else the host does falls on both."""
    header("Eager calls of causal attention, bf16, ε = 0.1, with the host: ms of one of ten; µs until one returns",
           "B,H,T,D", "SDPA", "k = 2", "k = 2 / SDPA", "SDPA returns", "k = 2 returns")  # fmt: skip
    for shape in EAGER_SHAPES:
        inputs = [normal(*shape) for _ in range(3)]
        ways = [passes(way, inputs) for way in (causal_sdpa, ours(2.0))]
        for name, calls in zip(("forward", "forward + backward"), zip(*ways, strict=True), strict=True):
            theirs, mine = interleaved(calls, 10, wait=True)
            returns = [f"{1e6 * seconds:.0f}" for seconds in interleaved(calls, 1, wait=False)]
            row(f"{','.join(map(str, shape))} {name}", 1e3 * theirs, 1e3 * mine, f"{mine / theirs:.2f}", *returns)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With the backend that PyTorch takes by itself."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def interleaved(functions: Sequence[Callable[[], object]], calls: int, wait: bool) -> list[float]:
    """Returns the median of the seconds of a call of each function, among `calls` calls in a row on an idle GPU.

    With `wait` they end when the GPU has done them, and otherwise when the last call returns.
    """
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(EAGER_WARMUP + EAGER_ROUNDS):
        for function, kept in zip(functions, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if wait:
                torch.cuda.synchronize()
            kept.append((time.perf_counter() - start) / calls)
    return [statistics.median(kept[EAGER_WARMUP:]) for kept in times]


def decoding_table() -> None:
    """The keys of a row are all of its cache, as its length says, which lies on the device."""
    ways = {f"SDPA {name}": with_backend(backend, causal=False) for name, backend in SDPA.items()}
    ways |= {f"k = {k:g}": decoding(k) for k in DECODED_BUDGETS}
    header("Decoding, one query against a cache, bf16, ε = 0.1, µs", "B,H,S,D", *ways, "k = 2 / best SDPA")
    for B, H, S, D in CACHES:
        inputs = normal(B, H, 1, D), normal(B, H, S, D), normal(B, H, S, D)
        times = {name: decoding_time(way, inputs) for name, way in ways.items()}
        best = min(time for name, time in times.items() if name.startswith("SDPA") and isinstance(time, float))
        shown = [f"{time:.1f}" if isinstance(time, float) else time for time in times.values()]
        mine = times["k = 2"]
        row(f"{B},{H},{S},{D}", *shown, f"{mine / best:.2f}" if isinstance(mine, float) else "–")


def decoding(k: float) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return decode_attention(query, key, value, lengths(len(key), key.shape[2]), k, eps=EPS)

    return run


@functools.cache
def lengths(B: int, S: int) -> Tensor:
    return torch.full((B,), S, device=GPU)


def decoding_time(way: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float | str:
    """Returns the median of the microseconds."""
    try:
        with torch.inference_mode():
            return 1000 * median(lambda: way(*inputs))
    except Exception as error:  # noqa: BLE001 - another library's limit is a cell of the table
        return type(error).__name__


def adasplash_table() -> None:
    if not importlib.util.find_spec("adasplash"):
        print("\nAdaSplash-2 is not timed: the package adasplash is not installed")
        return
    from adasplash import adasplash_v2

    header("AdaSplash-2 on inputs as above: forward / forward + backward, ms", "B,H,T,D", "AdaSplash-2", "k = 2")
    for shape in SHAPES:
        inputs = [normal(*shape) for _ in range(3)]
        forward, both = forward_and_both(ours(2.0), inputs)
        row(",".join(map(str, shape)), attention_cell(adasplash_v2, inputs), f"{forward:.3f} / {both:.3f}")


def training_memory(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> int:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])
    return peak_memory(lambda: torch.autograd.grad(function(*leaves), leaves, grad))


if __name__ == "__main__":
    main(sys.argv[1:])
