"""Attention problems of any shape, what the specification says of them, and what the door gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from colt5_attention.coor_descent import coor_descent
from torch import Tensor

from cda_cli.ops import reference_gradients, reference_soft_topk, soft_topk, soft_topk_attention
from tests.ops.cases import DEVICE, Rows, assert_within, differentiable, random_rows

NAMES = ("output", "∂L/∂query", "∂L/∂key", "∂L/∂value", "∂L/∂k")
# Leaving the annealing unfinished, so that its last ε is neither the given one nor that of the last update.
ANNEALING = {"n_iters": 6, "eps_init": 3.0, "eps_decay": 0.7}


class Problem(NamedTuple):
    """query [B,H,T,D], key and value [B,G,S,D], a budget that broadcasts to [B,H,T], and ∂L/∂output."""

    query: Tensor
    key: Tensor
    value: Tensor
    budget: Tensor
    grad_output: Tensor
    eps: float
    scale: float
    causal: bool
    documents: Tensor | None = None

    def seen(self) -> Tensor:
        """[T, S] ([B, 1, T, S] with documents), True where the query sees the key: s ≤ t + S − T, of its document."""
        T, S = self.query.shape[2], self.key.shape[2]
        places = torch.arange(S) - torch.arange(T).unsqueeze(-1)
        seen = places <= S - T if self.causal else torch.ones(T, S, dtype=torch.bool)
        if self.documents is None:
            return seen
        return (self.documents[:, None, S - T :, None] == self.documents[:, None, None, :]) & seen

    def settings(self, device: str = "cpu") -> dict[str, object]:
        documents = None if self.documents is None else self.documents.to(device)
        return {"eps": self.eps, "scale": self.scale, "causal": self.causal, "documents": documents}

    def whole(self) -> Problem:
        """The same with a key head for each query head."""
        group = self.query.shape[1] // self.key.shape[1]
        return self._replace(key=self.key.repeat_interleave(group, 1), value=self.value.repeat_interleave(group, 1))

    def rows(self) -> Rows:
        """The problem of each query, in float64."""
        scores = self.scale * self.query.double() @ self.whole().key.double().transpose(-1, -2)
        return Rows(scores, self.budget.double(), self.eps, self.seen())


def problem(
    shape: tuple[int, int, int, int, int],
    budget: float | tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    eps: float = 0.2,
    scale: float | None = None,
    causal: bool = True,
    seed: int = 0,
    key_heads: int | None = None,
    documents: Tensor | None = None,
) -> Problem:
    """Of shape B, H, T, S, D; `budget` is a number, or the shape of budgets from 0.3 on."""
    B, H, T, S, D = shape
    query, grad_output = random_rows(B, H, T, D, seed=seed), random_rows(B, H, T, D, seed=seed + 1)
    G = key_heads or H
    key, value = random_rows(B, G, S, D, seed=seed + 2), random_rows(B, G, S, D, seed=seed + 3)
    k = 0.3 + 3 * random_rows(*budget, seed=seed + 4).abs() if isinstance(budget, tuple) else torch.tensor(budget)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key, value, grad_output = (tensor.to(dtype) for tensor in (query, key, value, grad_output))
    return Problem(
        query, key, value, k.to(wide), grad_output, eps, D**-0.5 if scale is None else scale, causal, documents
    )


def with_scores(scores: Tensor, k: float, eps: float) -> Problem:
    """One head whose scores are `scores` [T, S] exactly: the keys are unit vectors, the queries the rows."""
    T, S = scores.shape
    identity, value = torch.eye(S)[None, None], random_rows(1, 1, S, S, seed=7)
    return Problem(
        scores[None, None], identity, value, torch.tensor(k), random_rows(1, 1, T, S, seed=8), eps, 1.0, False
    )


def run(this: Problem, device: str = "cpu", **settings: object) -> list[Tensor]:
    """What NAMES names, by the door on `device`; returned on the CPU."""
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in this[:4]]
    output = soft_topk_attention(*leaves, **this.settings(device), **settings)
    grads = torch.autograd.grad(output, leaves, this.grad_output.to(device))
    return [tensor.detach().cpu() for tensor in (output, *grads)]


def fused(this: Problem, **settings: object) -> list[Tensor]:
    return run(this, DEVICE, backend="triton", **settings)


def fused_output(this: Problem, **settings: object) -> Tensor:
    """The output of `fused`, with what a backward needs kept, but without the backward."""
    leaves = [tensor.detach().to(DEVICE).requires_grad_() for tensor in this[:4]]
    output = soft_topk_attention(*leaves, **this.settings(DEVICE), backend="triton", **settings)
    return output.detach().cpu()


def moved(this: Problem, elements: int) -> Problem:
    """The same numbers and strides, so many elements further into their memory."""

    def move(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=DEVICE)
        return memory[elements:].view(tensor.shape).copy_(tensor)

    return this._replace(**{name: move(getattr(this, name)) for name in this._fields[:5]})


def expect(this: Problem, solver: str = "exact") -> list[Tensor]:
    """What NAMES names, in float64 and dense: the specification, or the published operator where a query sees a key."""
    query, key, value, grad_output = (tensor.double() for tensor in (*this.whole()[:3], this.grad_output))
    grad_weights = grad_output @ value.transpose(-1, -2)
    rows = this.rows()
    budget = this.budget.double().expand(rows.scores.shape[:-1])
    if solver == "exact":
        solution = reference_soft_topk(rows.scores, budget, this.eps, rows.mask)
        weights = solution.weights
        grad_scores, grad_budget = reference_gradients(solution, budget, this.eps, grad_weights)
    else:
        weights, grad_scores, grad_budget = published_weights(rows, budget, grad_weights)
    groups = (*this.key.shape[:2], -1, *this.key.shape[2:])
    return [
        weights @ value,
        this.scale * grad_scores @ key,
        (this.scale * grad_scores.transpose(-1, -2) @ query).reshape(groups).sum(2),
        (weights.transpose(-1, -2) @ grad_output).reshape(groups).sum(2),
        grad_budget.sum_to_size(this.budget.shape),
    ]


class Scores(torch.autograd.Function):
    """query·keyᵀ with factors in their dtype and float32 sums, forward and backward, as matrix units have it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return query.float() @ key.float().transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        grad = grad.to(query.dtype)
        return grad @ key, grad.transpose(-1, -2) @ query


def plain(this: Problem, rounded_scores: bool) -> list[Tensor]:
    """Dense attention in PyTorch in the dtype of the problem; the scores in it too, or in float32."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in this[:4]]
    query, key, value, budget = leaves
    group = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(group, 1)
    scores = this.scale * (query @ keys.transpose(-1, -2) if rounded_scores else Scores.apply(query, keys))
    weights = soft_topk(scores, budget, eps=this.eps, mask=this.seen(), backend="torch")
    output = weights.to(value.dtype) @ value.repeat_interleave(group, 1)
    return [output.detach(), *torch.autograd.grad(output, leaves, this.grad_output)]


def published_weights(rows: Rows, budget: Tensor, grad_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    seeing = rows.visible().expand_as(rows.scores).any(-1)
    scores, k = rows.scores[seeing].requires_grad_(), budget[seeing].requires_grad_()
    mask = rows.visible().expand_as(rows.scores)[seeing]
    found = coor_descent(scores, k=k, mask=mask, eps=rows.eps, **ANNEALING)
    grad_scores, grad_k = torch.autograd.grad(found, (scores, k), grad_weights[seeing])
    weights, all_grad_scores, grad_budget = (torch.zeros_like(x) for x in (rows.scores, rows.scores, budget))
    weights[seeing], all_grad_scores[seeing], grad_budget[seeing] = found.detach(), grad_scores, grad_k
    return weights.detach(), all_grad_scores, grad_budget


def assert_close(actual: list[Tensor], expected: list[Tensor], relative: float, this: Problem) -> None:
    """To `relative` of the largest entry (of 1, for the output of queries that see nothing)."""
    for name, mine, exact, given_one in zip(NAMES, actual, expected, (this.value, *this[:4]), strict=True):
        assert mine.dtype == given_one.dtype, name
        assert_within(mine, exact, relative * exact.abs().max().clamp(min=1e-3).item(), name)


def assert_at_most_twice_plain(this: Problem, actual: list[Tensor]) -> None:
    """The accuracy rule of a kernel: against float64, at most twice the error of plain PyTorch in the same dtype.

    `actual` is what NAMES names, or the first of it.
    The error is ‖x − x*‖; the largest single one may be five times that of plain PyTorch, being one draw of a noise.
    Where plain PyTorch has float32 scores, ‖x − x*‖ is at most three times its own: as in any flash attention, δ comes
    from the rounded output.
    """
    assert smooth(this, 1e-4), "a kink of the operator: its gradient there is not one number"
    expected = expect(this)
    results = zip(NAMES, actual, plain(this, True), plain(this, False), expected, strict=False)
    for name, mine, theirs, careful, exact in results:
        assert mine.dtype == theirs.dtype, name
        error, rough, fine = (tensor.double() - exact for tensor in (mine, theirs, careful))
        assert error.norm() <= 2 * rough.norm(), f"{name}: error {error.norm():.3e}, plain PyTorch {rough.norm():.3e}"
        assert error.norm() <= 3 * fine.norm(), f"{name}: error {error.norm():.3e}, float32 scores {fine.norm():.3e}"
        assert_within(mine, exact, 5 * rough.abs().max().item(), name)


def smooth(this: Problem, margin: float) -> bool:
    rows = this.rows()
    solution = reference_soft_topk(rows.scores, rows.budget(), this.eps, rows.mask)
    spread = Rows(rows.scores, rows.budget(), rows.eps, rows.visible().expand_as(rows.scores))
    return bool(differentiable(spread, solution, margin).all())


def differentiable_problem(shape: tuple[int, int, int, int, int], k: float | Tensor, **settings: Any) -> Problem:
    """The first seed without a kink; k is given for each query, so that each has its own gradient."""
    for seed in range(100):
        this = problem(shape, 1.0, seed=seed, **settings)
        this = this._replace(budget=torch.as_tensor(k, dtype=this.budget.dtype).expand(shape[:3]).clone())
        if smooth(this, 1e-4):
            break
    return this


def packed(*lengths: int) -> Tensor:
    """Documents of these lengths, one after another: [length]."""
    return torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])


CASES = {
    "T=S": problem((2, 3, 17, 17, 8), 2.0),
    "a budget of each query": problem((2, 3, 19, 19, 7), (2, 3, 19)),
    "a budget of each head": problem((2, 3, 9, 9, 5), (3, 1)),
    "k=1 is softmax": problem((1, 2, 12, 12, 4), 1.0),
    "keys in front": problem((1, 2, 13, 22, 16), (1, 2, 13)),
    "one query against a cache": problem((2, 2, 1, 41, 8), 2.5),
    "queries that see nothing": problem((2, 1, 21, 13, 6), (2, 1, 21)),
    "many blocks": problem((1, 2, 70, 75, 4), 3.0),
    "k larger than the visible keys": problem((1, 2, 11, 11, 3), 5.0),
    "k larger than all keys": problem((1, 2, 11, 11, 3), 11.5),
    "not causal": problem((2, 2, 15, 18, 9), (2, 2, 15), causal=False),
    "not causal, T>S": problem((1, 2, 18, 5, 9), 2.0, causal=False),
    "D=1": problem((1, 3, 14, 14, 1), 2.0),
    "D=40": problem((1, 1, 23, 23, 40), 2.0),
    "a scale of its own": problem((1, 2, 16, 16, 8), 2.0, scale=0.9),
    "a negative scale": problem((1, 2, 16, 16, 8), 2.0, scale=-0.4),
    "a small eps": problem((1, 2, 16, 16, 8), 2.0, eps=0.03),
    "a large eps": problem((1, 2, 16, 16, 8), 2.0, eps=4.0),
    "grouped heads": problem((2, 6, 13, 17, 8), (2, 6, 13), key_heads=2),
    "documents": problem((2, 2, 21, 21, 8), 2.0, documents=torch.stack((packed(9, 12), packed(2, 5, 3, 11)))),
    "documents and keys in front": problem((1, 2, 12, 19, 8), 2.5, documents=packed(5, 6, 8)[None]),
    "documents, not causal": problem((1, 2, 20, 20, 8), 2.0, causal=False, documents=packed(7, 1, 12)[None]),
    "one of each": problem((1, 1, 1, 1, 1), 0.5),
}
