"""Truncated steps: attention keeps the largest weights of each row, as an evaluation under a cut does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from cda_cli.causal.cuts import Cut
from cda_cli.config import Config, OptimConfig
from cda_cli.data import Batch
from cda_cli.model import Transformer, Truncation, editing
from cda_cli.training.accounting.flops import flops_per_token
from cda_cli.training.auxiliary_losses import AuxiliaryLosses
from cda_cli.training.gradients import accumulate_gradients
from cda_cli.training.schedule import is_one_of
from tests.devices import DEVICES
from tests.model.cases import build, tiny, tokens
from tests.training.helpers import losses, trained, with_settings

CPU = torch.device("cpu")
RULES: list[dict[str, Any]] = [
    {"attention": "softmax", "null_kv": 2},
    {"attention": "tempered-softmax", "output_gate": True},
    {"attention": "coordinate-descent", "learned_k": True, "null_kv": 1},
]
TWO_STEPS: dict[str, Any] = {
    "model.depth": 1, "model.ff": "gelu", "model.dropout": 0.0, "optim.steps": 2, "optim.truncated_keys": 3,
    "run.sample_every": 0,
}  # fmt: skip


def gradients(
    model: nn.Module, batch: Batch, auxiliary: AuxiliaryLosses | None = None
) -> tuple[float, list[torch.Tensor]]:
    """Returns the loss and the gradients of all parameters, and of the weights of auxiliary losses."""
    device = next(model.parameters()).device
    leaves = [*model.parameters(), *(auxiliary.weights if auxiliary else [])]
    loss = accumulate_gradients(model, [batch], device, torch.float32)
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    return loss.item(), found


def a_batch() -> Batch:
    ids = tokens(tiny())
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(len(ids)))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_steps_of_a_share_lie_evenly(share: float) -> None:
    chosen = [is_one_of(step, share) for step in range(40)]
    assert sum(chosen) == round(40 * share)
    assert all(abs(sum(chosen[:n]) - n * share) < 1 for n in range(40))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_truncated_step_has_the_loss_of_a_cut(rule: dict[str, Any]) -> None:
    model, batch = build(tiny(**rule)), a_batch()
    with editing(model, rows=Truncation(3)):
        truncated = gradients(model, batch)[0]
    with torch.no_grad(), Cut("top", 3).applied(model) as changed:
        evaluated = changed(batch.inputs, targets_BT=batch.targets).mean().item()
    assert truncated == pytest.approx(evaluated, rel=1e-6)
    assert truncated != gradients(model, batch)[0], "nothing was cut"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("soft", [{"attention": "tempered-softmax"}, {"attention": "coordinate-descent", "attn_k": 1}])
def test_a_truncated_softmax_is_hard_topk(soft: dict[str, Any], backend: Any) -> None:
    """So is the soft top-k with k = 1, in loss and gradients."""
    device, batch = DEVICES[-1], a_batch()
    model, hard = (
        Transformer(tiny(depth=1, **rule), backend).to(device)
        for rule in (soft, {"attention": "hard-topk", "attn_k": 3.0})
    )
    hard.load_state_dict(model.state_dict())
    with editing(model, rows=Truncation(3)):
        loss, found = gradients(model, batch)
    expected_loss, expected = gradients(hard, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_one_compiled_graph_serves_all_truncated_steps() -> None:
    """With auxiliary losses, whose values and gradients are those of uncompiled code."""
    torch._dynamo.reset()
    model, batch, counter = build(tiny(depth=1, **RULES[2])), a_batch(), CompileCounter()
    called, truncation = torch.compile(model, backend=counter), Truncation(3)
    auxiliary = AuxiliaryLosses(OptimConfig(ff_l1=0.1, support_target=2.0), model, 1, CPU, {"support_multiplier": 0.5})
    for _ in range(2):
        for edit in (None, truncation):
            with editing(model, rows=edit):
                found = [gradients(one, batch, auxiliary) for one in (called, model)]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_only_truncated_steps_compute_dense_weights(config: Config) -> None:
    """Of the two counts, the mean of both kinds of steps is what a share of a half computes."""
    none, half, every = (
        flops_per_token(
            with_settings(config, {"optim.truncated_share": share}), "triton", torch.device("cpu"), torch.float32
        )
        for share in (0.0, 0.5, 1.0)
    )
    assert none.computed != every.computed
    assert half.computed == pytest.approx((none.computed + every.computed) / 2)
    assert none.dense == every.dense


def test_a_run_truncates_its_second_step(config: Config, tmp_path: Path) -> None:
    """Of a share of a half. test_auxiliary_losses.py stops such a run and goes on with it."""
    for share in (0.0, 0.5):
        trained(with_settings(config, TWO_STEPS | {"optim.truncated_share": share}), tmp_path / str(share))
    none, half = losses(tmp_path / "0.0"), losses(tmp_path / "0.5")
    assert half[1] == none[1]
    assert half[2] != none[2]
