"""Backend "triton": the kernels of `ops.triton`, on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..decoding import MOST_QUERIES, DecodingInputs
from ..precision import autocast_dtype
from ..solve_spec import Solver, SolveSpec
from ..transforms import transformed
from .pytorch import TorchBackend

# The kernels need bf16 in the matrix units and asynchronous copies (Ampere and later).
LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 6)
# The solvers of which attention is fused. Attention of the others works through blocks of queries on the row kernels.
FUSED: frozenset[Solver] = frozenset({"exact"})
# A tile of wider heads does not fit the memory of a multiprocessor.
WIDEST_HEAD = 256


def fused_products(
    query: torch.Size, key: torch.Size, dtype: torch.dtype, device: torch.device, at_most_two: bool
) -> tuple[int, int]:
    """How many matrix products fused attention makes in training, forward and backward (docs/kernels.md).

    `query` [B, H, T, D] and `key` [B, G, S, D] are the shapes, and `at_most_two` says whether k ≤ 2 is known. A product
    is one of each query with each key that it sees. Of a `device` that is no GPU, they are those of most GPUs.
    """
    if device.type != "cuda":
        return 3 if at_most_two else 4, 7
    from ..triton.attention_launches import products

    return products(query, key, dtype, device, at_most_two)


class TritonBackend(TorchBackend):
    """Rows by their kernels, and attention by fused ones. Transforms are those of PyTorch."""

    name = "triton"

    def supports(self, solver: Solver, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        if solver in FUSED and head_width > WIDEST_HEAD:
            return f"its attention holds heads of up to {WIDEST_HEAD} channels, not {head_width}"
        return _triton_obstacle(device, dtype)

    def attention(
        self, inputs: AttentionInputs, spec: SolveSpec, largest_k: float | None, return_threshold: bool
    ) -> tuple[Tensor, Tensor | None]:
        if spec.solver not in FUSED or transformed():
            return super().attention(inputs, spec, largest_k, return_threshold)
        return _fused(inputs, spec, largest_k, return_threshold)

    def decode(self, inputs: DecodingInputs) -> Tensor:
        from ..triton import decoding_launches  # Each further name would cost a call a microsecond.

        keys = inputs.key.shape[2]
        in_one = inputs.spec.solver in FUSED and decoding_launches.can_decode(inputs.largest_k, keys)
        # The compiler takes the row operator and makes the rest itself.
        if transformed() or inputs.query.shape[-1] > WIDEST_HEAD or (torch.compiler.is_compiling() and not in_one):
            return super().decode(inputs)
        query, key, value, lengths, budget, largest_k, spec, scale = inputs
        query, key, value, scale = _as_kernels_take_them(query, key, value, scale)
        inputs = DecodingInputs(query, key, value, lengths, budget, largest_k, spec, scale)
        if in_one:
            return decoding_launches.decode(inputs)
        if inputs.spec.solver not in FUSED and keys <= decoding_launches.LONGEST_ROW:
            return decoding_launches.decode_iterative(inputs)
        from ..triton.fused_attention import decode_by_scores

        return decode_by_scores(inputs)


def _fused(
    inputs: AttentionInputs, spec: SolveSpec, largest_k: float | None, return_threshold: bool
) -> tuple[Tensor, Tensor | None]:
    from ..triton.fused_attention import attend, threshold

    budget, documents, causal = inputs.budget, inputs.documents, inputs.causal
    query, key, value, scale = _as_kernels_take_them(*inputs[:3], inputs.scale)
    trained = query.requires_grad or key.requires_grad or value.requires_grad
    if isinstance(budget, Tensor):
        trained = trained or budget.requires_grad
        budget = budget.contiguous()  # here, so that the compiler makes it contiguous as it computes it
    trained = trained and torch.is_grad_enabled()
    T = query.shape[2]
    if T <= MOST_QUERIES and not (trained or return_threshold) and documents is None and (causal or T == 1):
        from ..triton.decoding_launches import can_decode, decode

        if can_decode(largest_k, key.shape[2]):
            return decode(DecodingInputs(query, key, value, None, budget, largest_k, spec, scale)), None
    at_most_two = largest_k is not None and largest_k <= 2
    output, stats = attend(query, key, value, budget, documents, spec.eps, scale, causal, at_most_two, trained)
    return output, threshold(stats.detach(), spec.eps, scale) if return_threshold else None


def _as_kernels_take_them(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The same attention, with query, key and value of one dtype, contiguous in the last dimension, and scale > 0."""
    if not query.dtype == key.dtype == value.dtype:
        dtype = autocast_dtype(value)
        if dtype is None:
            raise ValueError(
                f"backend 'triton' takes query, key and value of one dtype, not {query.dtype}, {key.dtype} and "
                f"{value.dtype}; convert them or choose backend 'torch'"
            )
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if scale <= 0:
        # The kernels compare the products q·k themselves, and a negative scale would reverse their order.
        query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return query, key, value, scale


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    return _find_triton_obstacle(device, dtype)


# torch.compiler.assume_constant_result would set this too. It would also import torch._dynamo, which takes as long as
# the rest of torch.
_triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # Every call of the operator asks.
def _find_triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the kernels compute in float32, and these tensors are float64"
    try:
        import triton
    except (ImportError, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "the package triton is not installed"
        return f"the package triton cannot be imported ({error})"
    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return f"the kernels need triton 3.6 or later, and this is {triton.__version__}"
    if device.type == "cpu":
        interpreted = triton.knobs.runtime.interpret
        return None if interpreted else "its kernels are for a GPU (or for TRITON_INTERPRET=1, to check them)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels were made for NVIDIA GPUs, not for {device.type}"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "the kernels need a GPU of compute capability 8.0 or later"
    return None
