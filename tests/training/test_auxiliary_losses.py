"""Auxiliary losses: their gradients are those of terms of the loss, and their multiplier is state of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cda_cli.config import Config, OptimConfig
from cda_cli.data import Batch
from cda_cli.errors import InterruptedRunError
from cda_cli.inspection import RecordWatcher, inspect
from cda_cli.model import ExcessSupport, Transformer, attention_rule
from cda_cli.runs.records import TrainRecord
from cda_cli.storage import locate
from cda_cli.training.auxiliary_losses import AuxiliaryLosses
from cda_cli.training.distributed.processes import ALONE
from cda_cli.training.gradients import accumulate_gradients
from cda_cli.training.nonfinite import StepResult
from tests.devices import DEVICES
from tests.model.cases import tiny, tokens
from tests.training.helpers import Memory, losses, trained, with_settings

RULES: list[dict[str, Any]] = [
    {"attention": "softmax", "null_kv": 2, "kv_heads": 1},
    {"attention": "tempered-softmax", "position": "rotary", "qk_norm": True},
    {"attention": "coordinate-descent", "learned_k": True},
    {"attention": "hard-topk"},
]
SIX_STEPS: dict[str, Any] = {
    "model.depth": 1, "model.ff": "relu2", "model.dropout": 0.0, "model.eps_anneal_start": None, "optim.steps": 6,
    "run.eval_every": 0, "run.sample_every": 0,
}  # fmt: skip


def a_batch(rows: int = 4) -> Batch:
    ids = tokens(tiny(), rows)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(len(ids)))


def a_model(device: str, backend: Any = "auto", **settings: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny(**settings), backend).to(device)


def added(model: Transformer, batches: int = 1, multiplier: float = 0.0, **optim: Any) -> AuxiliaryLosses:
    device = next(model.parameters()).device
    return AuxiliaryLosses(OptimConfig(**optim), model, batches, device, {"support_multiplier": multiplier})


def gradients(model: Transformer, batches: list[Batch]) -> list[Tensor]:
    accumulate_gradients(model, batches, next(model.parameters()).device, torch.float32)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def test_the_l1_norm_has_the_gradients_of_a_term_of_the_loss() -> None:
    """And the loss of the tokens is reported without it."""
    device, batch, seen = DEVICES[-1], a_batch(), []
    plain, model = (a_model(device, ff="relu2") for _ in range(2))

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0])

    for block in plain.each_block():
        block.feed_forward.proj_out.register_forward_pre_hook(see)
    loss = plain(batch.inputs.to(device), targets_BT=batch.targets.to(device)).mean()
    norm = torch.stack([units.abs().sum(-1).mean() for units in seen]).mean()
    (loss + 0.1 * norm).backward()
    auxiliary = added(model, ff_l1=0.1)
    reported = accumulate_gradients(model, [batch], torch.device(device), torch.float32)
    torch.testing.assert_close(reported, loss.detach())
    torch.testing.assert_close(auxiliary.measured(ALONE)["ff_l1"], norm.detach())
    for found, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, right.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rule", "backend"), [*((rule, "torch") for rule in RULES), (RULES[2], "triton")], ids=str)
def test_the_support_is_that_of_an_inspection(rule: dict[str, Any], backend: Any) -> None:
    """In a short sequence every row is of the sample. The gradient leads to a smaller support."""
    device, batch = DEVICES[-1], a_batch(2)
    model = a_model(device, backend, depth=1, **rule)
    auxiliary = added(model, support_target=2.0, multiplier=1e3)

    def support() -> tuple[float, float]:
        auxiliary.begin_step()
        accumulate_gradients(model, [batch], torch.device(device), torch.float32)
        watcher = RecordWatcher()
        inspect(model, [batch], torch.device(device), torch.float32, watcher)
        layers = [layer.effective_support for layer in watcher.recorded().layers]
        return auxiliary.measured(ALONE)["support"].item(), sum(layers) / len(layers)

    before = support()
    assert before[0] == pytest.approx(before[1], rel=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-5 * parameter.grad
    assert support()[0] < before[0]


@pytest.mark.parametrize("processes", [2, 3, 24])
def test_processes_that_divide_a_sequence_measure_the_rows_of_one(processes: int) -> None:
    """Each has two of its chunks, in which the sampled rows lie as in the whole. Some chunks may have none of them."""
    rule, T, null = attention_rule(tiny(attention="softmax", null_kv=2)), 96, 2
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, length, 4, generator=generator) for length in (T, null + T))

    def excess(sequences: list[tuple[int, int]], count: int) -> float:
        weight = torch.ones((), requires_grad=True)
        term = ExcessSupport(weight, target=2.0, parts=1)
        for first, stop in sequences:
            rows = query[:, :, first:stop].clone().requires_grad_()
            term(rule, rows, key[:, :, : null + stop], 1.0, count).sum().backward()
        assert weight.grad is not None
        return weight.grad.item() / count

    length = T // (2 * processes)
    chunks = [(first, first + length) for first in range(0, T, length)]
    assert excess(chunks, processes) == pytest.approx(excess([(0, T)], 1), rel=1e-5)


def test_batches_of_a_step_make_up_the_large_batch() -> None:
    batch, one, two = a_batch(4), a_model("cpu", ff="relu2"), a_model("cpu", ff="relu2")
    optim = {"ff_l1": 0.1, "support_target": 2.0, "multiplier": 0.7}
    whole, parts = added(one, 1, **optim), added(two, 2, **optim)
    halves = [batch.map(lambda values, start=start: values[start : start + 2]) for start in (0, 2)]
    for found, right in zip(gradients(two, halves), gradients(one, [batch]), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    for found, right in zip(parts.measured(ALONE).values(), whole.measured(ALONE).values(), strict=True):
        torch.testing.assert_close(found, right)


def test_blocks_that_are_recomputed_add_their_terms_once() -> None:
    """Activation checkpointing runs each block twice."""
    found = []
    for recomputes in (False, True):
        model = a_model("cpu", ff="relu2", learned_eps=True)
        model.activation_checkpointing = recomputes
        auxiliary = added(model, ff_l1=0.1, support_target=2.0, multiplier=0.7)
        found.append(gradients(model, [a_batch()]) + list(auxiliary.measured(ALONE).values()))
    for recomputed, right in zip(found[1], found[0], strict=True):
        assert torch.equal(recomputed, right)


def test_the_multiplier_rises_above_the_target_and_falls_below_it_but_not_under_0() -> None:
    model = a_model("cpu")
    auxiliary = added(model, support_target=4.0, support_rate=0.1)
    one = torch.ones(())
    seen = []
    for support, norm in ((8.0, one), (12.0, one), (12.0, one * torch.nan), (2.0, one), (0.0, one), (0.0, one * 3)):
        for _ in range(1 if support else 4):
            auxiliary.ascend(StepResult(one, norm, {"support": torch.tensor(support)}))
        seen.append(auxiliary.state()["support_multiplier"])
    assert seen == pytest.approx([0.1, 0.3, 0.3, 0.25, 0.0, 0.0]), "a refused step changes nothing"


def record(display: Memory, step: int) -> TrainRecord:
    return next(one for one in display.records if isinstance(one, TrainRecord) and one.step == step)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_goes_on_with_its_multiplier_and_its_truncated_steps(config: Config, tmp_path: Path, device: str) -> None:
    """The next step, of the other kind, has begun when the stop is answered. On a GPU CUDA graphs hold both kinds."""
    on_device = {"run.device": device, "run.deterministic": True, "run.compile": device != "cpu"}
    constraint = {"optim.support_target": 1.5, "optim.support_rate": 0.5, "optim.ff_l1": 0.01}
    truncated = {"optim.truncated_share": 0.5, "optim.truncated_keys": 3}
    asked = with_settings(config, SIX_STEPS | constraint | truncated | on_device)
    torch._dynamo.reset()
    whole = trained(asked, tmp_path / "whole")
    trained(with_settings(asked, {"run.cuda_graphs": False}), tmp_path / "no graphs")
    assert losses(tmp_path / "no graphs") == losses(tmp_path / "whole")
    with pytest.raises(InterruptedRunError, match="stopped at step 3"):
        trained(asked, tmp_path / "run", stop_after=3)
    resumed = trained(asked, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (locate(tmp_path / "run") / "model.safetensors").read_bytes() == (
        locate(tmp_path / "whole") / "model.safetensors"
    ).read_bytes()
    states = [json.loads((locate(tmp_path / name) / "state.json").read_text()) for name in ("run", "whole")]
    assert states[0]["support_multiplier"] == states[1]["support_multiplier"] > 0
    before, after = record(whole, 5), record(whole, 6)
    assert before.support is not None
    assert before.support_multiplier is not None
    assert after.support_multiplier == pytest.approx(before.support_multiplier + 0.5 * (before.support / 1.5 - 1))
    assert record(resumed, 6).support_multiplier == after.support_multiplier


def test_a_constraint_that_is_met_changes_no_bit(config: Config, tmp_path: Path) -> None:
    trained(with_settings(config, SIX_STEPS), tmp_path / "none")
    met = trained(with_settings(config, SIX_STEPS | {"optim.support_target": 1e3}), tmp_path / "met")
    assert losses(tmp_path / "met") == losses(tmp_path / "none")
    assert record(met, 6).support_multiplier == 0
