"""The kernel of `ops.largest_entries`, which reads a row once and holds it in registers; `torch.topk` also sorts.

Shapes: R rows, n entries; [ROWS, BLOCK] tensors in the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_tiles import any_of, load_entries, place_rows


@triton.jit
def largest_entries_kernel(rows, chosen, R, n, count, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The count-th largest entry is found bit by bit, as an integer that has the order of the numbers."""
    _, _, offset, inside = place_rows(R, n, ROWS, BLOCK)
    s = load_entries(rows, offset, inside, float("-inf"), WHOLE) + 0.0  # −0 and 0 are equal.
    bits = s.to(tl.int32, bitcast=True)
    # The bits of negative numbers grow with their size. What does not exist is below −inf.
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if not WHOLE:
        order = tl.where(inside, order, -0x7FFFFFFF - 1)
    # The threshold is the largest integer with at least `count` entries from it on: first its sign, then bit by bit.
    enough = tl.sum((order >= 0).to(tl.int32), 1) >= count
    threshold = tl.where(enough, 0, -0x7FFFFFFF - 1)
    for place in range(31):
        higher = threshold + (1 << (30 - place))
        enough = tl.sum((order >= higher[:, None]).to(tl.int32), 1) >= count
        threshold = tl.where(enough, higher, threshold)
    largest = order >= threshold[:, None]
    # Of entries equal to the threshold the first ones are taken.
    surplus = tl.sum(largest.to(tl.int32), 1) - count
    if any_of(surplus > 0):
        equal = order == threshold[:, None]
        wanted = tl.sum(equal.to(tl.int32), 1) - surplus
        largest &= ~equal | (tl.cumsum(equal.to(tl.int32), 1) <= wanted[:, None])
    tl.store(chosen + offset, largest.to(tl.uint8), mask=inside)
