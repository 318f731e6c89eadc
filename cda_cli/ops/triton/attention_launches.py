"""How the attention kernels are launched: tiles, grids, numbers, and compiled kernels that are found once per layout.

Triton looks at every argument of every call to find the compiled kernel. In a layer of a training step at T = 1024,
this and the choice of tile and numbers would take the host longer than the kernels take the GPU (docs/kernels.md).
Calls of one `Layout` differ only in pointers, ε and scale, so they share their launches.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_backward import delta_kernel, grad_query_kernel, query_kernel
from .attention_backward_in_turn import in_turn_kernel
from .attention_backward_keys import key_value_kernel
from .attention_forward import output_kernel, solve_kernel
from .attention_leader import leader_kernel, leader_output_kernel
from .attention_one_pass import one_pass_kernel
from .attention_output import weighted_sum_kernel
from .prepared_launch import LaunchOnStream, prepare
from .tiles import INTERPRETED

# So many layouts are remembered. A process is not likely to alternate between more lengths.
LAYOUTS = 256

# Gluon is experimental: it renames what these kernels call. They were compiled with these versions of Triton.
GLUON_OF = ("3.6", "3.7")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # as Triton calls them
# Padded head widths, and the fewest keys, for which one pass was faster than two on an H200 (docs/log.md).
ONE_PASS_WIDTHS = (64, 128)
ONE_PASS_KEYS = 512
# The fewest keys for which the second pass of any k is in Gluon, by the padded width of heads, and likewise where it
# sums free and capped entries apart: on an H200 it was slower there with 2,048, and faster with 8,192 (docs/log.md).
OUTPUT_KEYS = {64: 4096, 128: 2048}
SPLIT_KEYS = {128: 4096}
# The fewest queries and keys for which a backward makes five products in place of seven, by the padded width of heads.
# Those of 128 lie between a length of equal times, 1,536, and one at which five were faster, 8,192 (docs/log.md).
IN_TURN_LENGTHS = {64: 1024, 128: 2048}
# So many key heads have their gradients computed at a time. With more of them, fewer programs of a head run at the same
# time: they wait less for each other, and read less of what another one has just read.
IN_TURN_HEADS = 32
# Bytes of keys and values that one pass has at work: about half of an H200's cache.
AT_WORK = 32 << 20

Steps = tuple[int, ...]  # strides [B, H, length] of a tensor [B, H, length, D], which is contiguous in D


class Layout(NamedTuple):
    """What decides how a call is launched."""

    device: torch.device
    dtype: torch.dtype
    query: torch.Size
    key: torch.Size
    query_steps: Steps
    key_steps: Steps
    value_steps: Steps
    grad_steps: Steps  # of the output's gradient, and of `summed`: () in a forward
    summed_steps: Steps
    causal: bool
    documents: bool
    # Whether every input is aligned to 16 bytes, for which Triton compiles. Outputs are new, so they always are. Dtypes
    # that are not listed follow from `dtype`, or are always the same.
    aligned: bool
    one_budget: bool = False  # whether a number is the k of all queries

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Tensor,
        causal: bool,
        documents: Tensor | None,
        grad_output: Tensor | None = None,
        summed: Tensor | None = None,
        one_budget: bool = False,
    ) -> Layout:
        """`others` are the tensors whose pointers alone matter."""
        bits = query.data_ptr() | key.data_ptr() | value.data_ptr()
        for x in others:
            bits |= x.data_ptr()
        if grad_output is not None and summed is not None:
            bits |= grad_output.data_ptr() | summed.data_ptr()
        return Layout(
            query.device,
            query.dtype,
            query.shape,
            key.shape,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            () if grad_output is None else grad_output.stride()[:3],
            () if summed is None else summed.stride()[:3],
            causal,
            documents is not None,
            bits % 16 == 0,
            one_budget,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, H, T, D, G, S."""
        return (*self.query, *self.key[1:3])

    @property
    def bulk(self) -> bool:
        """Whether the bulk copy engine can read the tensors.

        It came with compute capability 9.0, and needs strides that are multiples of 16 bytes.
        """
        steps = (*self.query_steps, *self.key_steps, *self.value_steps, *self.grad_steps)
        fits = self.aligned and self.dtype != torch.float32 and all(step > 0 and step % 8 == 0 for step in steps)
        return fits and (INTERPRETED.value or triton.runtime.driver.active.get_current_target().arch >= 90)

    @property
    def gluon_refusal(self) -> str:
        """Why no kernel in Gluon can take the call; empty if one can."""
        if INTERPRETED.value:
            return "Gluon has no interpreter"
        if not triton.__version__.startswith(GLUON_OF):
            return f"the kernels are in the Gluon of triton {' and '.join(GLUON_OF)}, and this is {triton.__version__}"
        if triton.runtime.driver.active.get_current_target().arch != 90:
            return "its products are those of compute capability 9.0"
        if not self.bulk:
            return "the bulk copy engine cannot read the tensors"
        return ""

    @property
    def one_pass_refusal(self) -> str:
        """Why k ≤ 2 takes two passes over the keys and not one; empty if it takes one."""
        if refusal := self.gluon_refusal:
            return refusal
        if padded(self.query[-1]) not in ONE_PASS_WIDTHS:
            return "two passes are faster for heads of this width"
        if self.key[2] < ONE_PASS_KEYS:
            return "two passes are faster for so few keys"
        return ""

    def weighted_sum_refusal(self, split: bool) -> str:
        """Why the second pass of any k is not the kernel in Gluon; empty if it is. `split`: see `output_kernel`."""
        if refusal := self.gluon_refusal:
            return refusal
        least = (SPLIT_KEYS if split else OUTPUT_KEYS).get(padded(self.query[-1]))
        if least is None:
            return "the other form is faster for heads of this width"
        if self.key[2] < least:
            return "the other form is faster for so few keys"
        return ""

    @property
    def in_turn_refusal(self) -> str:
        """Why a backward takes seven products in two kernels and not five in one; empty if it takes five."""
        if refusal := self.gluon_refusal:
            return refusal
        least = IN_TURN_LENGTHS.get(padded(self.query[-1]))
        if least is None:
            return "seven products are faster for heads of this width"
        if min(self.query[2], self.key[2]) < least:
            return "seven products are faster for so few queries or keys"
        return ""


class Launch:
    """A kernel with its grid, its numbers and its options.

    It is called with the arguments that change from call to call, which come first in the signature of the kernel. A
    compiled kernel takes all arguments in the order of the signature, constants too (Triton 3.6 and 3.7). Where the
    bulk copy engine can, it reads blocks of `rows` of the arguments that are named in `blocks`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: Steps,
        options: dict[str, Any],
        layout: Layout,
        rows: int = 0,
        blocks: tuple[str, ...] = (),
    ) -> None:
        self._kernel, self._grid, self._numbers, self._options = kernel, (*grid, 1), numbers, options
        self._kept = layout.aligned  # Other pointers may need another compiled kernel.
        self._device = layout.device.index
        self._compiled: Any = None
        self._again: LaunchOnStream | None = None
        self._rest: tuple[Any, ...] = ()
        self._width, self._T = padded(layout.query[-1]), layout.query[2]
        self._rows = dict.fromkeys(blocks, rows)
        self._blocks = {kernel.arg_names.index(name): name for name in blocks if options["BULK"]}

    def __call__(self, *varying: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            self._launch_first(self._described(varying))
        elif self._again is None or _hooked():
            compiled[self._grid](*self._described(varying), *self._rest)
        else:
            self._again(triton.runtime.driver.active.get_current_stream(self._device), varying)

    def _launch_first(self, varying: tuple[Any, ...]) -> None:
        compiled = self._kernel[self._grid](*varying, *self._numbers, **self._options)
        if self._kept and compiled is not None:  # The interpreter compiles nothing.
            constants = self._kernel.arg_names[len(varying) + len(self._numbers) :]
            self._rest = (*self._numbers, *(self._options[name] for name in constants))
            self._again = prepare(compiled, self._grid, varying, self._rest)
            self._compiled = compiled

    def _described(self, varying: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same arguments, with descriptors of the tensors of which the kernel reads blocks."""
        return tuple(
            self._descriptor(self._blocks[place], x) if place in self._blocks else x for place, x in enumerate(varying)
        )

    def _descriptor(self, name: str, tensor: Tensor) -> TensorDescriptor | GluonDescriptor:
        return TensorDescriptor(tensor, *self._described_as(name, tensor))

    def _described_as(self, name: str, tensor: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Shape, strides and blocks of [B, H, length, D], or `duals` [4, B, H, length ≥ T], rows one below another."""
        shape, strides = list(tensor.shape), list(tensor.stride())
        if name == "duals":
            return [tensor[..., 0].numel(), self._T], strides[-2:], [1, self._rows[name]]
        return shape, strides, [1, 1, self._rows[name], self._width]


class GluonLaunch(Launch):
    """A kernel in Gluon, which reads blocks of so many `rows` of each argument that it names."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: Steps,
        options: dict[str, Any],
        layout: Layout,
        rows: dict[str, int],
    ) -> None:
        super().__init__(kernel, grid, numbers, options, layout)
        self._rows = rows
        self._blocks = {kernel.arg_names.index(name): name for name in rows}

    def _descriptor(self, name: str, tensor: Tensor) -> GluonDescriptor:
        shape, strides, block = self._described_as(name, tensor)
        if name == "duals":  # vectors
            layout = gluon_language.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        else:
            dtype = gluon_language.dtype(DTYPES[tensor.dtype])
            layout = gluon_language.NVMMASharedLayout.get_default_for(block, dtype)
        return GluonDescriptor(tensor, shape, strides, block, layout)


def _hooked() -> bool:
    """Whether a profiler asks Triton for each launch."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


class Tile(NamedTuple):
    """Queries and keys of a tile, and how Triton compiles the loop over them."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    step: int = 1  # Tiles in one step of the loop, if the kernel has such steps.

    def options(self, layout: Layout) -> dict[str, Any]:
        """The named arguments that every kernel over tiles takes."""
        width = layout.query[-1]
        shape = {"D": width, "BLOCK_D": padded(width), "BLOCK_M": self.queries, "BLOCK_N": self.keys}
        sight = {"CAUSAL": layout.causal, "RANGES": layout.documents, "BULK": layout.bulk}
        return shape | sight | {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def _tile(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of each kernel for heads of `width`, as measured on Hopper (docs/kernels.md)."""
    if dtype == torch.float32:
        # Exact float32 products run outside the matrix units and keep both operands in registers.
        return Tile(16, 32, 4, 1) if width > 64 else Tile(32, 32, 4, 1)
    if width > 128:
        return {
            "leader": Tile(64, 64, 4, 2),
            "leader_output": Tile(64, 64, 4, 2),
            "solve": Tile(64, 64, 4, 2),
            "output": Tile(64, 64, 4, 2),
            "split": Tile(64, 32, 8, 2),
            "query": Tile(64, 32, 4, 2),
            "key_value": Tile(32, 64, 8, 1),
        }[kernel]
    if width > 64:
        return {
            "leader": Tile(64, 128, 4, 3, 168),
            "leader_output": Tile(64, 64, 4, 3),
            "solve": Tile(64, 64, 4, 2, 128),
            "output": Tile(64, 64, 4, 3),
            "split": Tile(64, 64, 4, 3),
            "query": Tile(128, 64, 8, 3),
            "key_value": Tile(64, 64, 4, 2),
        }[kernel]
    return {
        "leader": Tile(64, 128, 4, 2, 168, step=2),
        "leader_output": Tile(64, 128, 4, 2, 168),
        "solve": Tile(64, 64, 4, 3, 168),
        "output": Tile(64, 64, 4, 3),
        "split": Tile(64, 64, 4, 3),
        "query": Tile(64, 64, 4, 3),
        "key_value": Tile(64, 64, 4, 2, 168),
    }[kernel]


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def heads_inside(x: Tensor, length: int) -> Tensor:
    """An empty [B, H, length, D] whose memory is [B, length, H, D], so that merging the heads needs no copy."""
    B, H, _, D = x.shape
    return x.new_empty_strided((B, H, length, D), (length * H * D, D, H * D, 1))


def _inside(heads: int, length: int, width: int) -> Steps:
    """The steps of `heads_inside`."""
    return (length * heads * width, width, heads * width)


def _over_queries(
    kernel: Any, name: str, numbers: Steps, layout: Layout, blocks: tuple[str, ...], **constants: Any
) -> Launch:
    """A program for each block of queries, which goes over blocks of keys."""
    B, H, T, D, *_ = layout.sizes
    this = _tile(name, D, layout.dtype)
    grid = (triton.cdiv(T, this.queries), B * H)
    return Launch(kernel, grid, numbers, this.options(layout) | constants, layout, this.keys, blocks)


def _two_passes(layout: Layout) -> tuple[Steps, Steps]:
    """The numbers of the two kernels of a forward.

    The first kernel reads queries and keys. The second also reads values, and writes the output.
    """
    B, H, T, D, G, S = layout.sizes
    scores, sizes = (*layout.query_steps, *layout.key_steps), (H, H // G, T, S, B * H * T)
    return (*scores, *sizes), (*scores, *layout.value_steps, *_inside(H, T, D), *sizes)


@functools.lru_cache(maxsize=LAYOUTS)
def leader_and_output(layout: Layout) -> tuple[Launch, Launch]:
    first, second = _two_passes(layout)
    this, both = _tile("leader", layout.query[-1], layout.dtype), ("key", "value")
    return (
        _over_queries(leader_kernel, "leader", first, layout, ("key",), CLASSES=min(64, this.keys), STEP=this.step),
        _over_queries(leader_output_kernel, "leader_output", second, layout, both, EACH=not layout.one_budget),
    )


class GluonTile(NamedTuple):
    """Queries of a group of warps, keys of a tile, tiles in flight, and groups."""

    queries: int = 64
    keys: int = 128
    stages: int = 2
    groups: int = 2
    registers: int = 168


def one_pass_tile(width: int) -> GluonTile:
    return GluonTile(stages=2 if padded(width) > 64 else 3)


def output_tile(width: int, split: bool) -> GluonTile:
    if padded(width) > 64:
        return GluonTile(keys=64, stages=3) if split else GluonTile()
    return GluonTile(groups=3, registers=128)


def _by_spans(kernel: Any, this: GluonTile, output_first: Steps, layout: Layout, **constants: Any) -> Launch:
    """A program for each block of queries, over so many heads at a time that their keys and values stay in the cache.

    `output_first` are the numbers of the kernel up to the strides of its output.
    """
    B, H, T, D, G, S = layout.sizes
    bytes_of_head = 2 * S * padded(D) * layout.dtype.itemsize
    span = min(B * H, max(1, AT_WORK // bytes_of_head) * (H // G))
    numbers = (*output_first, *_inside(H, T, D), H, H // G, T, S, B * H * T, span)
    options = {
        "D": D, "M": this.queries, "N": this.keys, "STAGES": this.stages, "CAUSAL": layout.causal,
        "RANGES": layout.documents, "num_warps": 4, "maxnreg": this.registers,
    }  # fmt: skip
    grid = (triton.cdiv(T, this.groups * this.queries) * B * H, 1)
    rows = {"query": this.queries, "key": this.keys, "value": this.keys}
    return GluonLaunch(kernel, grid, numbers, options | constants, layout, rows)


@functools.lru_cache(maxsize=LAYOUTS)
def one_pass(layout: Layout) -> Launch | None:
    """The launch for k ≤ 2 that reads the keys once; None where `one_pass_refusal` says why it is not taken."""
    if layout.one_pass_refusal:
        return None
    strides = (*layout.key_steps, *layout.value_steps)
    return _by_spans(one_pass_kernel, one_pass_tile(layout.query[-1]), strides, layout, EACH=not layout.one_budget)


@functools.lru_cache(maxsize=LAYOUTS)
def solve_and_output(layout: Layout, split: bool) -> tuple[Launch, Launch]:
    """With `split` the second kernel also writes the part of the output from free entries."""
    first, second = _two_passes(layout)
    solve = _over_queries(solve_kernel, "solve", first, layout, ("key",), EACH=not layout.one_budget)
    if not layout.weighted_sum_refusal(split):
        this = output_tile(layout.query[-1], split)
        return solve, _by_spans(weighted_sum_kernel, this, (), layout, GROUPS=this.groups, SPLIT=split)
    name = "split" if split else "output"
    return solve, _over_queries(output_kernel, name, second, layout, ("key", "value"), SPLIT=split)


@functools.lru_cache(maxsize=LAYOUTS)
def backward(layout: Layout, leaders: bool) -> tuple[Launch, Launch]:
    """The launches for the gradient of the queries, and for those of keys and values."""
    B, H, T, D, G, S = layout.sizes
    length, find_delta = dual_length(T), layout.dtype == torch.float32
    strides = (*layout.query_steps, *layout.key_steps, *layout.value_steps, *layout.grad_steps)
    parts = (B * H * length, length)
    numbers = (*strides, *layout.summed_steps, *_inside(H, T, D), *parts, H, H // G, T, S, B * H * T)
    both = "key", "value"
    query = _over_queries(query_kernel, "query", numbers, layout, both, LEADERS=leaders, FIND_DELTA=find_delta)
    this = _tile("key_value", D, layout.dtype)
    numbers = (*strides, *_inside(G, S, D), *_inside(G, S, D), *parts, G, H // G, T, S)
    grid = (triton.cdiv(S, this.keys), B * G)
    blocks = "query", "grad_output", "duals"
    return query, Launch(key_value_kernel, grid, numbers, this.options(layout), layout, this.queries, blocks)


class InTurnTile(NamedTuple):
    """Queries and keys of a tile, tiles of queries in flight, and how `in_turn_kernel` works on them."""

    queries: int = 64
    keys: int = 128
    stages: int = 2
    late: bool = False
    registers: int = 168


def in_turn_tile(width: int) -> InTurnTile:
    return InTurnTile(stages=3, late=True) if padded(width) > 64 else InTurnTile()


class InTurn(NamedTuple):
    """The launches of a backward in five products, and the numbers of their memory."""

    prepare: Launch
    add_up: Launch
    finish: Launch
    sums: int  # float32
    turns: int  # int32


@functools.lru_cache(maxsize=LAYOUTS)
def backward_in_turn(layout: Layout, leaders: bool) -> InTurn | None:
    """None where `in_turn_refusal` says why it is not taken."""
    if layout.in_turn_refusal:
        return None
    B, H, T, D, G, S = layout.sizes
    this, width, length = in_turn_tile(D), padded(D), dual_length(T)
    tiles = triton.cdiv(T, this.queries)
    over_queries = (tiles, B * H)
    shape = {"D": D, "BLOCK_D": width, "BLOCK_M": this.queries}
    steps, parts = (*layout.value_steps, *layout.grad_steps, *layout.summed_steps), (B * H * length, length)
    numbers = (*steps, *parts, H, H // G, T, B * H * T)
    options = shape | {"BLOCK_N": this.keys, "RANGES": layout.documents, "LEADERS": leaders}
    prepare = Launch(delta_kernel, over_queries, numbers, options, layout)
    reach = S - T if layout.causal else S
    numbers = (*_inside(G, S, D), *_inside(G, S, D), G, H // G, T, S, reach, B * H, min(B * G, IN_TURN_HEADS))
    options = {
        "D": D, "M": this.queries, "N": this.keys, "STAGES": this.stages, "RANGES": layout.documents,
        "LATE": this.late, "num_warps": this.keys // 16, "maxnreg": this.registers,
    }  # fmt: skip
    rows = dict.fromkeys(("query", "grad_output", "duals"), this.queries) | dict.fromkeys(("key", "value"), this.keys)
    add_up = GluonLaunch(in_turn_kernel, (triton.cdiv(S, this.keys) * B * G, 1), numbers, options, layout, rows)
    finish = Launch(grad_query_kernel, over_queries, (*_inside(H, T, D), H, T), shape, layout)
    return InTurn(prepare, add_up, finish, B * H * tiles * this.queries * width, 1 + B * H * tiles)


def products(
    query: torch.Size, key: torch.Size, dtype: torch.dtype, device: torch.device, at_most_two: bool
) -> tuple[int, int]:
    """How many matrix products the kernels make forward and backward, on new tensors of these shapes."""
    per_query, per_key = (_inside(*shape[1:]) for shape in (query, key))
    steps = (per_query, per_key, per_key, per_query, per_query)
    layout = Layout(device, dtype, query, key, *steps, causal=True, documents=False, aligned=True)
    forward = 4 if not at_most_two else 3 if layout.one_pass_refusal else 2
    return forward, 7 if layout.in_turn_refusal else 5


def dual_length(T: int) -> int:
    """The length of a row of duals: the bulk copy engine needs rows whose bytes are a multiple of 16."""
    return -(-T // 4) * 4
