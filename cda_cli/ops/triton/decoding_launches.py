"""How the decoding kernels are launched: one launch a call, prepared once for each layout of the tensors.

The grid depends on the shapes and the GPU alone, so a CUDA graph may hold the launch, whatever the lengths will be.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..decoding import DecodingInputs
from ..solvers.iterative import Annealing
from ..transforms import observed
from .arrivals import arrivals
from .attention_launches import LAYOUTS, Launch, Layout, heads_inside, padded
from .decoding_iterative import decode_iterative_kernel
from .decoding_query import decode_query_kernel
from .decoding_tiles import decode_tile_kernel
from .row_launches import on_device

# The largest k of the kernels. A split keeps the scores that may be capped, fewer than k.
LARGEST_K = 16
# Splits at most: the merge takes the pieces of all of them at once.
MOST_SPLITS = 128
# Keys of a split whose members are solved in registers, at most.
LONGEST = 2048
# Keys of a row with the iterative solver, at most: one program reads them all.
LONGEST_ROW = 4096
# Multiprocessors for which the interpreter deals out splits.
INTERPRETED_PROCESSORS = 4
# What a program takes to begin and to end, in blocks of keys.
OVERHEAD = 4
# Keys that each multiprocessor has to read of one row, from which on one large program is faster than many small ones.
LONG_SPLIT = 2048
# Members of a tile, the fewest that matrix units take: further ones are another tile. So many of them are solved and
# merged at a time: more would not fit the registers.
QUERIES, ROWS = 16, 4
# float32 registers of a thread that one tensor may fill.
REGISTERS = 32


class Tile(NamedTuple):
    """Keys of a block, how Triton compiles the loop over blocks, and programs that a multiprocessor should hold.

    `merge` is what a piece adds to the merge, in blocks of keys.
    """

    keys: int
    warps: int
    stages: int
    programs: int
    merge: float = 1 / 32


def query_tile(layout: Layout, kept: int) -> Tile:
    """The tile of `decode_query_kernel`, as timed on an H200 (docs/log.md)."""
    B, H, T, width, _, S = layout.sizes
    if layout.dtype == torch.float32 or width > 128 or width % 16:
        return Tile(16, 4, 3, 3)  # Triton reads rows of such a width number by number.
    rows, count = B * H * T, processors(layout.device)
    is_long = rows <= count and rows * S >= LONG_SPLIT * count
    if width > 64:
        return Tile(64, 8, 3, 1) if is_long else Tile(16, 2, 3, 6, 1 / 10)
    if not kept:
        return Tile(64, 4, 3, 3)
    # One warp adds up its pieces without a barrier, which counts where a split is short.
    return Tile(128, 8, 3, 1) if is_long else Tile(16, 1, 3, 12, 1 / 10)


def member_tile(width: int, dtype: torch.dtype) -> Tile:
    """The tile of `decode_tile_kernel`."""
    if dtype == torch.float32:
        return Tile(32, 4, 1, 2)
    return Tile(32 if width > 128 else 64, 4, 3, 2)


def iterative_tile(layout: Layout) -> Tile:
    """The tile of `decode_iterative_kernel`, as timed on an H200 (docs/log.md)."""
    B, H, T, width, _, S = layout.sizes
    rows, count = B * H * T, processors(layout.device)
    # Alone on its multiprocessor, a program waits for its keys.
    warps, stages = (4, 3) if rows > count else (4, 5) if S <= 512 else (8, 3)
    if width % 16:
        return Tile(16, warps, 3, 1)  # Triton reads rows of such a width number by number.
    # What a thread has of a tile stays within its registers.
    keys = 2048 * warps // (padded(width) * layout.dtype.itemsize)
    return Tile(min(16 * warps, max(16, keys)), warps, stages, 1)


@functools.cache
def kept_scores(largest_k: float) -> int:
    """C, the scores that a split keeps out of its sums: at least ⌈k⌉ − 1, a power of two or 0."""
    needed = math.ceil(largest_k) - 1
    return triton.next_power_of_2(needed) if needed > 0 else 0


def splits_of(programs: int, blocks: int, slots: int, merge: float) -> int:
    """Splits for so many rows or tiles, each of so many blocks of keys, where `slots` programs run at a time.

    Those that end first, if a program takes as long as its blocks and OVERHEAD more, and each split adds `merge`.
    """

    def cost(splits: int) -> float:
        waves = triton.cdiv(programs * splits, slots)
        return waves * (triton.cdiv(blocks, splits) + OVERHEAD) + merge * splits

    # Of the counts that leave a split as many blocks, the smallest.
    counts = {triton.cdiv(blocks, each) for each in range(1, blocks + 1)}
    return min((n for n in sorted(counts) if n <= MOST_SPLITS), key=cost)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Decoding(NamedTuple):
    """A launch, the float32 numbers of its parts, and the programs that merge."""

    launch: Launch
    parts: int
    programs: int


def can_decode(largest_k: float | None, keys: int) -> bool:
    """Whether the kernels serve such a k, and so many keys."""
    return largest_k is not None and largest_k <= LARGEST_K and keys <= MOST_SPLITS * LONGEST


@functools.lru_cache(maxsize=LAYOUTS)
def decoding(layout: Layout, lengths: torch.dtype | None, budgets: bool, kept: int) -> Decoding:
    """The launch for a layout; `lengths` is the dtype of the lengths, if there are any."""
    _, H, T, _, G, _ = layout.sizes
    alone = H == G and T == 1 and kept <= 1
    return (_one_query if alone else _members)(layout, lengths is not None, budgets, kept)


def _numbers(layout: Layout) -> tuple[int, ...]:
    _, H, T, D, G, S = layout.sizes
    steps = (*layout.query_steps, *layout.key_steps, *layout.value_steps, T * H * D, D, H * D)
    return (*steps, G, H // G, T, S)


def _options(layout: Layout, this: Tile, kept: int, merged: int, splits: int, **others: Any) -> dict[str, Any]:
    """The named arguments of both kernels, where `merged` rows are merged at a time."""
    width = layout.query[-1]
    pieces = triton.next_power_of_2(splits * (1 + kept))
    added = max(1, REGISTERS * 32 * this.warps // (merged * padded(width)))
    shape = {"D": width, "BLOCK_D": padded(width), "BLOCK_N": this.keys, "C": kept}
    return shape | {"PIECES": pieces, "ADDED": min(pieces, added), "num_warps": this.warps} | others


def _one_query(layout: Layout, lengths: bool, budgets: bool, kept: int) -> Decoding:
    B, H, T, D, _, S = layout.sizes
    this, rows = query_tile(layout, kept), B * H * T
    merge = this.merge * (1 + kept)
    splits = splits_of(rows, triton.cdiv(S, this.keys), processors(layout.device) * this.programs, merge)
    options = _options(layout, this, kept, 1, splits, LENGTHS=lengths, BUDGETS=budgets, STAGES=this.stages)
    launch = Launch(decode_query_kernel, (splits, rows), (*_numbers(layout), rows, splits), options, layout)
    return Decoding(launch, rows * splits * (2 + kept + (1 + kept) * D), rows)


def _members(layout: Layout, lengths: bool, budgets: bool, kept: int) -> Decoding:
    B, H, T, D, G, S = layout.sizes
    this, rows, members = member_tile(D, layout.dtype), B * H * T, H // G * T
    tiles, blocks = B * G * triton.cdiv(members, QUERIES), triton.cdiv(S, this.keys)
    splits = splits_of(tiles, blocks, processors(layout.device) * this.programs, this.merge * (1 + kept))
    splits = max(splits, triton.cdiv(blocks, LONGEST // this.keys))
    length = triton.next_power_of_2(triton.cdiv(blocks, splits) * this.keys)
    scores_length = (blocks + 1) * this.keys
    room = REGISTERS * 32 * this.warps
    most = min(ROWS, triton.next_power_of_2(members))
    merged = min(most, max(1, room // triton.next_power_of_2(splits * (1 + kept))))
    options = _options(
        layout, this, kept, merged, splits, BLOCK_M=QUERIES, LENGTH=length, BLOCK_R=min(most, max(1, room // length)),
        MERGED=merged, LENGTHS=lengths, BUDGETS=budgets, num_stages=this.stages,
    )  # fmt: skip
    numbers = (*_numbers(layout), rows, splits, scores_length)
    launch = Launch(decode_tile_kernel, (splits, tiles), numbers, options, layout)
    return Decoding(launch, rows * (splits * (4 + kept + (1 + kept) * D) + scores_length), tiles)


@functools.lru_cache(maxsize=LAYOUTS)
def _iterative(layout: Layout, lengths: torch.dtype | None, budgets: bool) -> Launch:
    """The launch for a layout; `lengths` is the dtype of the lengths, if there are any."""
    B, H, T, D, _, S = layout.sizes
    this = iterative_tile(layout)
    options = {
        "D": D, "BLOCK_D": padded(D), "BLOCK_N": this.keys, "BLOCK_S": max(this.keys, triton.next_power_of_2(S)),
        "LENGTHS": lengths is not None, "BUDGETS": budgets, "STAGES": this.stages, "num_warps": this.warps,
    }  # fmt: skip
    return Launch(decode_iterative_kernel, (B * H * T, 1), _numbers(layout), options, layout)


def decode_iterative(inputs: DecodingInputs) -> Tensor:
    """What `decode` gives, by the iterative solver, for any k and at most LONGEST_ROW keys."""
    query, key, value, lengths, budget, _, spec, scale = inputs
    B, H, T, _ = query.shape
    output = heads_inside(query, T)
    if not output.numel():
        return output
    budgets, number = (budget.contiguous(), 1.0) if isinstance(budget, Tensor) else (None, budget)
    lengths = None if lengths is None else lengths.contiguous()
    others = [x for x in (lengths, budgets) if x is not None]
    layout = Layout.of(query, key, value, *others, causal=True, documents=None)
    plan = Annealing.of(spec)
    units = tuple(eps * math.log(2) for eps in plan.steps)
    # Triton compiles for the type of a number, and for a whole number 1 by itself. A launch keeps its first kernel.
    numbers = (number, float(scale), spec.n_iters, plan.steps.index(plan.steps[-1]), float(plan.last))
    with torch.cuda.device_of(query):
        _iterative(layout, None if lengths is None else lengths.dtype, budgets is not None)(
            query, key, value, query if lengths is None else lengths, query if budgets is None else budgets,
            on_device((*units, *(1 / unit for unit in units)), query.device), output,
            query.new_empty(B * H * T, key.shape[2], dtype=torch.float32), *numbers,
        )  # fmt: skip
    return output


def decode(inputs: DecodingInputs) -> Tensor:
    """Output [B, H, T, D], whose memory is [B, T, H, D], for inputs of which `can_decode` is true.

    query, key and value have one dtype (float32, bf16, fp16) and are contiguous in the last dimension, scale > 0, and
    the solver is the exact one. A row whose k is above `largest_k` may be NaN.
    """
    query, key, value, lengths, budget, largest_k, spec, scale = inputs
    assert largest_k is not None
    budgets = budget.contiguous() if isinstance(budget, Tensor) else None
    number = float(largest_k if isinstance(budget, Tensor) else budget)  # for the reason in `decode_iterative`
    lengths = None if lengths is None else lengths.contiguous()
    run = _decode_operator if observed(query, key, value) else _decode
    return run(query, key, value, lengths, budgets, number, largest_k, scale / spec.eps * math.log2(math.e))


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    budgets: Tensor | None,
    budget: float,
    largest_k: float,
    factor: float,
) -> Tensor:
    """What `decode` gives; `budgets` is None where every k is `budget`, and `factor` is that of `tiles`."""
    output = heads_inside(query, query.shape[2])
    if not output.numel():
        return output
    others = [x for x in (lengths, budgets) if x is not None]
    layout = Layout.of(query, key, value, *others, causal=True, documents=None)
    dtype = None if lengths is None else lengths.dtype
    launch, parts, programs = decoding(layout, dtype, budgets is not None, kept_scores(largest_k))
    with torch.cuda.device_of(query):
        launch(
            query, key, value, query if lengths is None else lengths, query if budgets is None else budgets, output,
            query.new_empty(parts, dtype=torch.float32), arrivals.zeros(query.device, programs), budget, factor,
        )  # fmt: skip
    return output


_decode_operator = torch.library.custom_op("cda::decode_attention", mutates_args=())(_decode)


@_decode_operator.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return heads_inside(query, query.shape[2])
