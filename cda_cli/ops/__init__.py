"""The operator: the entropic soft top-k of scores, and attention whose weights it gives.

    λ = argmax ⟨s, λ⟩ − ε Σ λ log λ   subject to   0 ≤ λ ≤ 1, Σ λ = k

The doors are `soft_topk`, `soft_topk_attention` and, for a few queries of a cache, `decode_attention`; everything
behind them is a backend. They take tensors and numbers, and import nothing of the rest of the package.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .attention_blocks import scores_at_once
from .attention_inputs import AttentionInputs
from .backends import BACKENDS, Backend, Choice, can_run_kernels, choose_backend
from .backends.triton_kernels import fused_products
from .checks import (
    check_attention,
    check_decoding,
    check_finite,
    check_positive,
    check_rows,
    checked_budget,
    checked_spec,
    row_budgets,
)
from .decoding import DecodingInputs
from .decoding_step import WIDEST_STREAM, HeadBudgets, add_and_norm, draw_token, heads_of_step, routed_blocks
from .dense import for_each_query
from .heads import Heads, norm_and_rotate
from .largest import largest_entries
from .precision import autocast_dtype, settle_vector_functions
from .reference import reference_attention, reference_gradients, reference_soft_topk
from .solve_spec import Solver, SolverSettings

__all__ = [
    "WIDEST_STREAM",
    "Backend",
    "Choice",
    "HeadBudgets",
    "Heads",
    "Solver",
    "SolverSettings",
    "add_and_norm",
    "can_run_kernels",
    "choose_backend",
    "decode_attention",
    "draw_token",
    "for_each_query",
    "fused_products",
    "heads_of_step",
    "largest_entries",
    "norm_and_rotate",
    "reference_attention",
    "reference_gradients",
    "reference_soft_topk",
    "routed_blocks",
    "scores_at_once",
    "soft_topk",
    "soft_topk_attention",
]

settle_vector_functions()  # when this is imported, as any later call may be the first one of a process


def soft_topk(
    scores: Tensor,
    sparsity_k: float | Tensor,
    *,
    eps: float = 0.1,
    mask: Tensor | None = None,
    solver: Solver = "exact",
    n_iters: int = 20,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
    backend: Backend = "auto",
) -> Tensor:
    """Soft top-k weights of the last dimension: λ_i = min(1, exp((s_i + a)/ε)) with Σ λ = k.

    Args:
        scores: [..., n], float32, bf16, fp16 or float64; arithmetic is float32, or float64 for float64. −inf counts as
            masked.
        sparsity_k: the budget k > 0, a number or a tensor broadcastable to scores.shape[:-1]; differentiable. A row
            with no more than k visible entries gets weight 1 on each, and gradient 0; k may be inf. A tensor on a CPU
            that holds a k ≤ 0 is refused. On a GPU, in compiled code and in a transform of torch.func, where a look
            would cost a synchronisation or is not possible, such a k makes its row NaN, as a k that is NaN does
            everywhere: no weight is ever outside [0, 1].
        eps: the temperature ε > 0, in the units of the scores. k = 1 is softmax(scores/ε); ε → 0 is hard top-k.
        mask: bool, broadcastable to scores.shape, True = visible; a masked entry gets weight and gradient 0.
        solver: "exact" is the optimum; "iterative" is n_iters steps of ε-scaled coordinate descent from ε = eps_init,
            times eps_decay (above 0, at most 1) each step, as `colt5_attention.coor_descent` does it.
        backend: "torch", "triton" (the kernels, on a GPU), "colt5" (the published operator; iterative only), or "auto":
            "triton" on a GPU that can run it, and "torch" elsewhere.

    Returns:
        Weights of the shape and dtype of `scores`. Nothing is kept for the backward but the scores and a few numbers
        per row. Forward mode, gradients of gradients and the transforms of torch.func are right too; they work through
        plain PyTorch, on copies of the rows, whichever of "torch" and "triton" runs.

    Raises:
        ValueError: a setting, a shape or a device without meaning. TypeError: an argument of a wrong type or dtype.
        ImportError: a backend that this machine lacks.

    Sources: operator and exact solver, arXiv 2304.04947 (the problem) and Newton on its dual; docs/operator.md.
    """
    check_rows(scores, mask)
    spec = checked_spec(solver, eps, n_iters, eps_init, eps_decay)
    chosen = choose_backend(backend, solver, scores.device, scores.dtype)
    budget = row_budgets(sparsity_k, scores, scores.shape[:-1])
    if not scores.shape[-1]:
        return scores.clone()
    return BACKENDS[chosen.name].rows(scores, budget, mask, spec)


@overload
def soft_topk_attention(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    sparsity_k: float | Tensor,
    *,
    eps: float = ...,
    scale: float | None = ...,
    causal: bool = ...,
    documents: Tensor | None = ...,
    solver: Solver = ...,
    n_iters: int = ...,
    eps_init: float = ...,
    eps_decay: float = ...,
    backend: Backend = ...,
    largest_k: float | None = ...,
    return_threshold: Literal[False] = ...,
) -> Tensor: ...


@overload
def soft_topk_attention(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    sparsity_k: float | Tensor,
    *,
    eps: float = ...,
    scale: float | None = ...,
    causal: bool = ...,
    documents: Tensor | None = ...,
    solver: Solver = ...,
    n_iters: int = ...,
    eps_init: float = ...,
    eps_decay: float = ...,
    backend: Backend = ...,
    largest_k: float | None = ...,
    return_threshold: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def soft_topk_attention(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    sparsity_k: float | Tensor,
    *,
    eps: float = 0.1,
    scale: float | None = None,
    causal: bool = True,
    documents: Tensor | None = None,
    solver: Solver = "exact",
    n_iters: int = 20,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
    backend: Backend = "auto",
    largest_k: float | None = None,
    return_threshold: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose weights are the soft top-k of scale·query·key: each head may attend fully to k keys.

    Args:
        query_BHTD: [B, H, T, D]; key_BHSD, value_BHSD: [B, G, S, D] with H a multiple of G: each key head serves H/G
            neighbouring query heads; float32, bf16, fp16 or float64.
        sparsity_k: the budget k > 0 of a row, a number or a tensor broadcastable to [B, H, T]; differentiable. For a k
            that is not above 0 the rule of `soft_topk` holds: refused on a CPU, else the output of its query is NaN.
        eps: the temperature ε > 0, in the units of the scaled scores.
        scale: factor on the scores; D ** -0.5 where not given.
        causal: query t sees keys up to t + S − T (the last query sees every key, so that cached or null keys stand in
            front). A query that sees no key gets output 0.
        documents: integers [B, S], S ≥ T, of packed texts: a query sees the keys of its own run of equal numbers only,
            and its k counts there.
        solver, n_iters, eps_init, eps_decay, backend: as for `soft_topk`. With "triton" the exact solver is fused, with
            no T × S tensor; the iterative one works through blocks of queries, as "torch" does, on the row kernels.
        largest_k: an upper bound of a `sparsity_k` that is a tensor. The kernels are faster if they know that it is at
            most 2. A row whose k then exceeds 2 is NaN there.
        return_threshold: also return a [B, H, T], without gradient: weights are min(1, exp((scores + a)/ε)), where ε
            is the last of the annealing for the iterative solver; +inf where k covers all that the query sees.

    Returns:
        Output [B, H, T, D] in the dtype of `value_BHSD`; under autocast in autocast's dtype, as
        F.scaled_dot_product_attention has it, unless `value_BHSD` is float64. Autocast rounds the output alone: the
        arithmetic is that of the inputs (of several dtypes they are cast to autocast's for "triton").
        Backend "triton" needs O(T) memory; "torch" works through blocks of queries, so its memory is O(block × S),
        forward and backward; "colt5" builds the T × S scores. So do forward mode, gradients of gradients and the
        transforms of torch.func, which work through plain PyTorch whichever of "torch" and "triton" runs.

    Raises:
        ValueError: a setting, a shape or a device without meaning. TypeError: an argument of a wrong type or dtype.
        ImportError: a backend that this machine lacks.
    """
    check_attention(query_BHTD, key_BHSD, value_BHSD, documents)
    spec = checked_spec(solver, eps, n_iters, eps_init, eps_decay)
    head_width = query_BHTD.shape[-1]
    chosen = choose_backend(backend, solver, query_BHTD.device, query_BHTD.dtype, head_width)
    budget = checked_budget(sparsity_k, query_BHTD)
    if scale is None:
        scale = head_width**-0.5
    check_finite("scale", scale)
    if largest_k is not None:
        check_positive("largest_k", largest_k, infinite=True)
    if not isinstance(budget, Tensor):  # No tensor is made of it, which would be another launch.
        largest_k = budget
    inputs = AttentionInputs(query_BHTD, key_BHSD, value_BHSD, budget, documents, scale, causal)
    output, threshold = BACKENDS[chosen.name].attention(inputs, spec, largest_k, return_threshold)
    dtype = autocast_dtype(value_BHSD) or value_BHSD.dtype
    output = output if output.dtype == dtype else output.to(dtype)
    return (output, threshold.detach()) if return_threshold and threshold is not None else output


def decode_attention(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    lengths_B: Tensor | None,
    sparsity_k: float | Tensor,
    *,
    eps: float,
    scale: float | None = None,
    solver: Solver = "exact",
    n_iters: int = 20,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
    backend: Backend = "auto",
    largest_k: float | None = None,
) -> Tensor:
    """Attention of the newest T ≤ 8 positions to a cache of keys: `soft_topk_attention` with a length for each row.

    Args:
        query_BHTD: [B, H, T, D]; key_BGSD, value_BGSD: [B, G, S, D] with H a multiple of G: each key head serves H/G
            neighbouring query heads; float32, bf16, fp16 or float64. What lies behind the length of a row has no
            effect, but must be finite: not every backend leaves it unread.
        lengths_B: whole numbers [B] on the same device, at most S: query t of row b sees the keys before
            lengths_b − T + t + 1. A query that sees no key gets output 0. None: each row has S keys.
        sparsity_k, eps, scale, solver, n_iters, eps_init, eps_decay: as for `soft_topk_attention`.
        backend: "triton" is one launch, where k is at most 16 with the exact solver, and S at most 4096 with the
            iterative one; so is "auto" on a GPU that can run it. The lengths stay on the device, so a CUDA graph may
            hold the call. "torch" computes all scores in plain PyTorch.
        largest_k: an upper bound of a `sparsity_k` that is a tensor, for the exact solver. Without one, or above 16,
            "triton" writes all scores and calls the row operator. A row whose k exceeds the bound may be NaN.

    Returns:
        Output [B, H, T, D], without a gradient, in the dtype that `soft_topk_attention` gives it. It is deterministic.

    Raises:
        ValueError: a setting, a shape or a device without meaning. TypeError: an argument of a wrong type or dtype.
    """
    check_decoding(query_BHTD, key_BGSD, value_BGSD, lengths_B)
    spec = checked_spec(solver, eps, n_iters, eps_init, eps_decay)
    head_width = query_BHTD.shape[-1]
    chosen = choose_backend(backend, solver, query_BHTD.device, query_BHTD.dtype, head_width)
    if scale is None:
        scale = head_width**-0.5
    check_finite("scale", scale)
    if largest_k is not None:
        check_positive("largest_k", largest_k, infinite=True)
    budget = checked_budget(sparsity_k, query_BHTD)
    if not isinstance(budget, Tensor):
        largest_k = budget
    inputs = DecodingInputs(query_BHTD, key_BGSD, value_BGSD, lengths_B, budget, largest_k, spec, scale)
    output = BACKENDS[chosen.name].decode(inputs)
    dtype = autocast_dtype(value_BGSD) or value_BGSD.dtype
    return output if output.dtype == dtype else output.to(dtype)
