"""Backend "colt5": the published operator, `colt5_attention`, the yardstick of parity tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_inputs import AttentionInputs, budget_of_each
from ..dense import dense_scores, weighted_values
from ..precision import in_own_precision
from ..solve_spec import Solver, SolveSpec
from ..transforms import transformed
from .base import OperatorBackend


class Colt5Backend(OperatorBackend):
    """The iterative solver only, and attention by all T × S scores."""

    name = "colt5"

    def supports(self, solver: Solver, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        return None if solver == "iterative" else f"has no {solver} solver"

    def refusal(self, obstacle: str) -> str:
        return f"backend 'colt5' {obstacle}; choose solver 'iterative' or backend 'torch'"

    def rows(self, scores: Tensor, budget: Tensor, mask: Tensor | None, spec: SolveSpec) -> Tensor:
        return published_soft_topk(scores, budget, mask, spec)

    def attention(
        self, inputs: AttentionInputs, spec: SolveSpec, largest_k: float | None, return_threshold: bool
    ) -> tuple[Tensor, None]:
        if return_threshold:
            raise ValueError("backend 'colt5' does not give the threshold; choose backend 'torch'")
        return _published_attention(inputs, spec), None


@in_own_precision
def _published_attention(inputs: AttentionInputs, spec: SolveSpec) -> Tensor:
    budget = budget_of_each(inputs.budget, inputs.query)
    weights = published_soft_topk(dense_scores(inputs), budget, None, spec)
    return weighted_values(weights, inputs.value)


def published_soft_topk(scores: Tensor, budget: Tensor, mask: Tensor | None, spec: SolveSpec) -> Tensor:
    """`coor_descent` on a CPU, `triton_coor_descent` on CUDA; float32 inside, differentiable by autograd.

    Arguments and result are those of `OperatorBackend.rows`. Raises, in one sentence, ImportError where the package or,
    for CUDA tensors, its Triton module cannot be imported, and ValueError within a transform.
    """
    if transformed():
        raise ValueError(
            "backend 'colt5' is not made for forward mode or the transforms of torch.func; choose backend 'torch'"
        )
    rows = scores.float()
    if (rows == -torch.inf).any():  # −inf counts as masked, as it does for the other backends
        mask = (rows != -torch.inf) if mask is None else mask & (rows != -torch.inf)
    _, eps, n_iters, eps_init, eps_decay = spec
    arguments = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay, "mask": mask}
    if not scores.is_cuda:
        from colt5_attention.coor_descent import coor_descent

        return coor_descent(rows, k=budget.float(), **arguments).to(scores.dtype)
    try:
        from colt5_attention.triton_coor_descent import triton_coor_descent
    except (ImportError, SystemExit) as error:  # some of its releases call exit() where Triton is missing
        raise ImportError(
            "backend 'colt5' needs Triton on a GPU; pip install triton, or use backend 'torch'"
        ) from error
    segments = max(1, n_iters // 5)  # as the published model calls it
    if mask is not None:
        arguments["mask"] = mask.expand(scores.shape)
    weights = triton_coor_descent(rows, k=budget.float().flatten(), checkpoint_segments=segments, **arguments)
    return weights.to(scores.dtype)
