"""From the dual of a row to its weights and their gradients, which both doors share.

    λ_i = min(1, exp((s_i + a)/ε))  =  capped_i + mass · p_i,   p = softmax(s/ε) over the free entries,  mass = k − m

The dual is kept as a pair. `shift` is the largest free score itself, so that differences are taken between two scores
and a row keeps its accuracy when |s|/ε is large; `peak` is the weight of that score, above 0 and at most 1. So
a = ε log(peak) − shift, and an entry is capped exactly if (s_i − shift)/ε + log(peak) > 0. Rows where everything
visible is capped have shift = the lowest finite number and peak = 1.

The arithmetic takes products, clamps and softmax. On a CPU, comparisons, masked_fill and even exp cost several times as
much as each of them.

Shapes: R rows, n entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Subtracted from a score, it takes the entry out of a softmax; unlike inf it never makes NaN of an empty row.
FAR = 1e30


class Dual(NamedTuple):
    """shift [R] and peak [R], in the dtype of the arithmetic (float32 or float64)."""

    shift: Tensor
    peak: Tensor

    def threshold(self, eps: float) -> Tensor:
        """a [R], +inf where everything visible is capped."""
        return torch.where(self.everything_capped(), torch.inf, eps * self.peak.log() - self.shift)

    def everything_capped(self) -> Tensor:
        return self.shift <= torch.finfo(self.shift.dtype).min


def usable(budget: Tensor) -> Tensor:
    """The k of each row [R]. It is NaN where k is not above 0, which makes the weights of the row NaN."""
    return budget.masked_fill(budget <= 0, torch.nan)


class Parts(NamedTuple):
    """The weights of rows in two parts: capped [R, n], 1 or 0, and mass [R] times free [R, n], which sums to 1."""

    capped: Tensor
    mass: Tensor
    free: Tensor

    def weights(self) -> Tensor:
        """λ [R, n]. The call overwrites `capped`."""
        return self.capped.addcmul_(self.free, self.mass.unsqueeze(-1))


def parts(scores: Tensor, dual: Dual, eps: float) -> Parts:
    """The parts of the weights of `scores` [R, n] under a known dual. Masked entries are lowest finite or −inf."""
    if eps == 1.0:
        x = scores - (dual.shift - dual.peak.log()).unsqueeze(-1)
    else:
        x = (scores - dual.shift.unsqueeze(-1)).div_(eps).add_(dual.peak.log().unsqueeze(-1))
    capped = x.relu().mul_(FAR).clamp_(max=1.0)
    free = x.clamp_(max=1.0).sub_(capped, alpha=FAR).softmax(-1)
    mass = torch.where(dual.everything_capped(), 0.0, dual.peak / free.amax(-1))
    return Parts(capped, mass, free)


def exact_gradients(parts: Parts, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(ε·∂L/∂s [R, n], ∂L/∂k [R]) of the optimum, for g = ∂L/∂λ [R, n].

    δ = Σ_U λ g / (k − m) = Σ p g over the free entries U; ∂L/∂s = (λ/ε)(g − δ) on U and 0 elsewhere; ∂L/∂k = δ. Rows
    with nothing free have mass 0 and gradient 0.
    """
    weighted = parts.free * grad_weights
    delta = weighted.sum(-1)
    grad = weighted.addcmul_(parts.free, delta.unsqueeze(-1), value=-1).mul_(parts.mass.unsqueeze(-1))
    return grad, torch.where(parts.mass > 0, delta, 0.0)
