"""The doors refuse what has no meaning before they compute anything, each time in one sentence."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from .decoding import MOST_QUERIES
from .precision import FLOAT32_MAX, arithmetic_dtype
from .solve_spec import Solver, SolveSpec
from .transforms import PLAIN, transformed

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensors(**tensors: Tensor) -> None:
    """Refuses what is no tensor, has a dtype that the operator does not compute with, or lies on another device."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, not {tensor.dtype}; convert it with .float()"
            )
        device = _same_device(name, tensor, device or tensor.device)


def checked_spec(solver: Solver, eps: float, n_iters: int, eps_init: float, eps_decay: float) -> SolveSpec:
    """The settings as one object. Refuses one without meaning, also where the solver does not read it."""
    check_positive("eps", eps)
    check_positive("eps_init", eps_init)
    check_positive("eps_decay", eps_decay)
    if eps_decay > 1:
        raise ValueError(f"eps_decay must be at most 1, not {eps_decay}: ε falls from eps_init to eps")
    if type(n_iters) is not int:
        _check_type("n_iters", n_iters, Integral, "a whole number")
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, not {n_iters}")
    return SolveSpec(solver, eps, n_iters, eps_init, eps_decay)


def check_positive(name: str, value: float, *, infinite: bool = False) -> None:
    """Refuses `value` unless it is a number above 0; +inf passes only if `infinite`."""
    if type(value) is float and 0 < value < math.inf:
        return  # This is the usual case, and every call of the operator asks.
    _check_type(name, value, Real, "a number")
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, not {value}")
    if value == math.inf and not infinite:
        raise ValueError(f"{name} must be finite, not {value}")


def check_finite(name: str, value: float) -> None:
    """Refuses `value` unless it is a finite number."""
    if type(value) is not float:
        _check_type(name, value, Real, "a number")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, not {value}")


def check_rows(scores: Tensor, mask: Tensor | None) -> None:
    """Refuses anything but `scores` [..., n] and a mask that broadcasts to them."""
    check_tensors(scores=scores)
    if not scores.dim():
        raise ValueError("scores must have a dimension to select from, and these have none")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a tensor of bool, True = visible, not {_shown(mask)}")
    _same_device("mask", mask, scores.device)
    if not _broadcasts(mask.shape, scores.shape):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to the scores {tuple(scores.shape)}")


def check_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> None:
    """Refuses all but query [B, H, T, D], key, value [B, G, S, D] with H a multiple of G, documents [B, S], S ≥ T."""
    check_tensors(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have the four dimensions batch, heads, length and width, not {tuple(tensor.shape)}"
            )
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    if key.shape != (B, G, S, D) or value.shape != key.shape or not D or not G or H % G:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: they are "
            "[B, H, T, D] and twice [B, G, S, D], with D at least 1 and H a multiple of G"
        )
    if documents is None:
        return
    if not isinstance(documents, Tensor) or documents.dtype not in WHOLE:
        raise TypeError(f"documents must be a tensor of whole numbers, not {_shown(documents)}")
    _same_device("documents", documents, query.device)
    if documents.shape != (B, S) or T > S:
        raise ValueError(f"documents must be [B, S] = {(B, S)} with S ≥ T = {T}, not {tuple(documents.shape)}")


def check_decoding(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> None:
    """Refuses all but what `check_attention` lets pass, with few queries, and whole numbers lengths [B]."""
    check_attention(query, key, value, None)
    B, _, T, _ = query.shape
    if T > MOST_QUERIES:
        raise ValueError(
            f"decoding takes at most {MOST_QUERIES} queries of each head, not {T}; call soft_topk_attention"
        )
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in WHOLE:
        raise TypeError(f"lengths must be a tensor of whole numbers, not {_shown(lengths)}")
    _same_device("lengths", lengths, query.device)
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be [B] = {(B,)}, not {tuple(lengths.shape)}")


def checked_budget(sparsity_k: float | Tensor, query: Tensor) -> float | Tensor:
    """The k of each query, [B, H, T], or the one number that is the k of all."""
    if isinstance(sparsity_k, Tensor):
        return row_budgets(sparsity_k, query, query.shape[:3])
    check_positive("sparsity_k", sparsity_k, infinite=True)
    return float(min(sparsity_k, FLOAT32_MAX))


def row_budgets(sparsity_k: float | Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """The k of each row, of `shape`, on the device of `like` and in the dtype of its arithmetic.

    A look into a tensor is free on a CPU. On a GPU it would wait for all that was launched, and a tracer has no numbers
    to show. There a k that is not above 0 makes its row NaN instead (`dual.usable`, and the kernels).
    """
    dtype = arithmetic_dtype(like.dtype)
    if not isinstance(sparsity_k, Tensor):
        check_positive("sparsity_k", sparsity_k, infinite=True)
        largest = FLOAT32_MAX if dtype == torch.float32 else torch.finfo(dtype).max
        return torch.full(shape, min(sparsity_k, largest), device=like.device, dtype=dtype)
    if sparsity_k.dtype not in FLOATING + WHOLE:
        raise TypeError(f"sparsity_k must hold numbers, not {sparsity_k.dtype}")
    if not _broadcasts(sparsity_k.shape, shape):
        raise ValueError(f"sparsity_k {tuple(sparsity_k.shape)} does not broadcast to the rows {tuple(shape)}")
    if _readable(sparsity_k) and bool((sparsity_k <= 0).any()):
        raise ValueError(f"sparsity_k must be greater than 0 in every row, not {sparsity_k.min().item()}")
    return sparsity_k.to(device=like.device, dtype=dtype).expand(shape)


def _readable(tensor: Tensor) -> bool:
    """Whether a look at its numbers costs nothing. A tensor of a subclass may have no numbers."""
    plain = tensor.device.type == "cpu" and type(tensor) in PLAIN
    return plain and not torch.compiler.is_compiling() and not transformed()


def _check_type(name: str, value: object, wanted: type, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise TypeError(f"{name} must be {words}, not {_shown(value)}")


def _same_device(name: str, tensor: Tensor, device: torch.device) -> torch.device:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and must be on {device}, like the tensor before it")
    return device


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    if shape == target:
        return True
    sizes = zip(reversed(shape), reversed(target), strict=False)
    # The sizes are compared one by one: torch.compile sets no guard for what `in` finds among symbols.
    return len(shape) <= len(target) and all(size == 1 or size == wanted for size, wanted in sizes)


def _shown(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
