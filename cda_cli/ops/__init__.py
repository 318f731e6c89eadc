"""The operator: the entropic soft top-k of scores, and attention whose weights it gives.

    λ = argmax ⟨s, λ⟩ − ε Σ λ log λ   subject to   0 ≤ λ ≤ 1, Σ λ = k

The two doors are `soft_topk` and `soft_topk_attention`; everything behind them is a backend. They take tensors and
numbers, and import nothing of the rest of the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cda_cli.ops.attention import blockwise_attention
from cda_cli.ops.backends import Backend, Choice, Solver, SolverSettings, choose_backend
from cda_cli.ops.precision import arithmetic_dtype, in_own_precision, settle_vector_functions
from cda_cli.ops.reference import reference_attention, reference_gradients, reference_soft_topk
from cda_cli.ops.rows import soft_topk_rows

__all__ = [
    "Backend",
    "Choice",
    "Solver",
    "SolverSettings",
    "choose_backend",
    "reference_attention",
    "reference_gradients",
    "reference_soft_topk",
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
        scores: [..., n], any floating dtype; arithmetic is float32, or float64 for float64. −inf counts as masked.
        sparsity_k: the budget k > 0, a number or a tensor broadcastable to scores.shape[:-1]; differentiable. A row
            with no more than k visible entries gets weight 1 on each, and gradient 0.
        eps: the temperature ε > 0, in the units of the scores. k = 1 is softmax(scores/ε); ε → 0 is hard top-k.
        mask: bool, broadcastable to scores.shape, True = visible; a masked entry gets weight and gradient 0.
        solver: "exact" is the optimum; "iterative" is n_iters steps of ε-scaled coordinate descent from ε = eps_init,
            times eps_decay each step, as `colt5_attention.coor_descent` does it.
        backend: "torch", "triton" (the kernels, on a GPU), "colt5" (the published operator; iterative only), or "auto":
            "triton" on a GPU that can run it, and "torch" elsewhere.

    Returns:
        Weights of the shape and dtype of `scores`. Nothing is kept for the backward but the scores and a few numbers
        per row.

    Raises:
        ValueError: a setting without meaning. ImportError: a backend that this machine lacks.

    Sources: operator and exact solver, arXiv 2304.04947 (the problem) and Newton on its dual; docs/operator.md.
    """
    chosen = choose_backend(backend, solver, scores.device, scores.dtype)
    _check_positive(eps=eps, eps_init=eps_init, n_iters=n_iters)
    if chosen.name == "colt5":
        from cda_cli.ops.published import published_soft_topk

        budget = _budget(sparsity_k, scores, scores.shape[:-1])
        return published_soft_topk(
            scores, budget, mask=mask, eps=eps, n_iters=n_iters, eps_init=eps_init, eps_decay=eps_decay
        )
    if not scores.shape[-1]:
        return scores.clone()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    budget = _budget(sparsity_k, scores, scores.shape[:-1]).reshape(-1)
    rows = scores.reshape(-1, scores.shape[-1])
    weights, _ = soft_topk_rows(rows, budget, eps, solver, n_iters, eps_init, eps_decay, chosen.name)
    return weights.view(scores.shape)


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
        sparsity_k: the budget k > 0 of a row, a number or a tensor broadcastable to [B, H, T]; differentiable.
        eps: the temperature ε > 0, in the units of the scaled scores.
        scale: factor on the scores; D ** -0.5 where not given.
        causal: query t sees keys up to t + S − T (the last query sees every key, so that cached or null keys stand in
            front). A query that sees no key gets output 0.
        documents: integers [B, S], S ≥ T, of packed texts: a query sees the keys of its own run of equal numbers only,
            and its k counts there.
        solver, n_iters, eps_init, eps_decay, backend: as for `soft_topk`. With "triton" the exact solver is fused, with
            no T × S tensor; the iterative one works through blocks of queries, as "torch" does, on the row kernels.
        largest_k: an upper bound of a `sparsity_k` that is a tensor. The kernels are faster if they know that it is at
            most 2. A row whose k then exceeds 2 is NaN there, except in decoding.
        return_threshold: also return a [B, H, T], without gradient: weights are min(1, exp((scores + a)/ε)), where ε
            is the last of the annealing for the iterative solver; +inf where k covers all that the query sees.

    Returns:
        Output [B, H, T, D] in the dtype of `value_BHSD`. Backend "triton" needs O(T) memory; "torch"
        works through blocks of queries, so its memory is O(block × S), forward and backward; "colt5" builds the T × S
        scores.

    Raises:
        ValueError: a setting without meaning. ImportError: a backend that this machine lacks.
    """
    B, H, T, D = query_BHTD.shape
    chosen = choose_backend(backend, solver, query_BHTD.device, query_BHTD.dtype, D)
    _check_positive(eps=eps, eps_init=eps_init, n_iters=n_iters)
    _check_shapes(query_BHTD, key_BHSD, value_BHSD, documents)
    budget = _budget(sparsity_k, query_BHTD, (B, H, T))
    scale = D**-0.5 if scale is None else scale
    if chosen.name == "triton" and solver == "exact":
        largest_k = largest_k if isinstance(sparsity_k, Tensor) else sparsity_k
        output, threshold = _fused(
            query_BHTD, key_BHSD, value_BHSD, budget, documents, eps, scale, causal, largest_k, return_threshold
        )
        return output if threshold is None else (output, threshold)
    if key_BHSD.shape[1] != H:
        key_BHSD, value_BHSD = (x.repeat_interleave(H // x.shape[1], 1) for x in (key_BHSD, value_BHSD))
    if chosen.name == "colt5":
        if return_threshold:
            raise ValueError("backend 'colt5' does not give the threshold; choose backend 'torch'")
        settings = {"eps": eps, "n_iters": n_iters, "eps_init": eps_init, "eps_decay": eps_decay}
        return _published_attention(query_BHTD, key_BHSD, value_BHSD, budget, documents, scale, causal, settings)
    output, threshold, _ = blockwise_attention(
        query_BHTD, key_BHSD, value_BHSD, budget, documents,
        eps, scale, causal, solver, n_iters, eps_init, eps_decay, chosen.name,
    )  # fmt: skip
    return (output, threshold.detach()) if return_threshold else output


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
    largest_k: float | None,
    return_threshold: bool,
) -> tuple[Tensor, Tensor | None]:
    from cda_cli.ops.triton.attention import fused_attention, threshold

    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"backend 'triton' takes query, key and value of one dtype, not {query.dtype}, {key.dtype} and "
            f"{value.dtype}; convert them or choose backend 'torch'"
        )
    if scale <= 0:
        # The kernels compare the products q·k themselves: a negative scale would turn their order round.
        query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, budget))
    at_most_two = largest_k is not None and largest_k <= 2
    budget = budget.contiguous()  # here, where the compiler makes it so as it computes it
    output, stats, *_ = fused_attention(query, key, value, budget, documents, eps, scale, causal, at_most_two, trained)
    return output, threshold(stats.detach(), eps, scale) if return_threshold else None


@in_own_precision
def _published_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    scale: float,
    causal: bool,
    settings: dict[str, Any],
) -> Tensor:
    from cda_cli.ops.published import published_soft_topk

    scores = scale * query.float() @ key.float().transpose(-1, -2)
    T, S = scores.shape[-2:]
    mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T) if causal else None
    if documents is not None:
        same = (documents[:, S - T :, None] == documents[:, None, :]).unsqueeze(1)
        mask = same if mask is None else mask & same
    weights = published_soft_topk(scores, budget, mask=mask, **settings)
    return (weights @ value.float()).to(value.dtype)


def _budget(sparsity_k: float | Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """k of each row, in the dtype of the arithmetic."""
    dtype = arithmetic_dtype(like.dtype)
    if isinstance(sparsity_k, Tensor):
        return sparsity_k.to(device=like.device, dtype=dtype).expand(shape)
    _check_positive(sparsity_k=sparsity_k)
    return torch.full(shape, float(sparsity_k), device=like.device, dtype=dtype)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, not {value}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> None:
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    if key.shape != (B, G, S, D) or value.shape != key.shape or not G or H % G:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: they are "
            "[B, H, T, D] and twice [B, G, S, D], with H a multiple of G"
        )
    if documents is not None and (documents.shape != (B, S) or T > S):
        raise ValueError(f"documents must be [B, S] = {(B, S)} with S ≥ T = {T}, not {tuple(documents.shape)}")
