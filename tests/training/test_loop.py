"""The steps of the training loop: accumulation, clipping, and what is shown and recorded when."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli import strict_json
from cda_cli.config import Config, ModelConfig
from cda_cli.data import IGNORE, Batch
from cda_cli.errors import InterruptedRunError
from cda_cli.model import Transformer
from cda_cli.runs.folder import Run
from cda_cli.runs.records import VERSION, TrainRecord, ValidationRecord, to_json
from cda_cli.runs.summary import summarise
from cda_cli.signals import StopRequest
from cda_cli.storage import list_steps
from cda_cli.training import pipeline
from cda_cli.training.gradients import accumulate_gradients, clip_gradients
from cda_cli.training.run import run_training
from cda_cli.training.schedule import due
from tests.training.helpers import Memory, changed, losses, trained, with_settings

CPU = torch.device("cpu")


def small_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=11, seq_len=6, dim=8, depth=1, heads=2))


def a_batch(rows: int, ignored: list[tuple[int, int]] = []) -> Batch:  # noqa: B006 - never changed
    """Returns a batch of random tokens. For each (row, count) in `ignored`, the first `count` targets are IGNORE."""
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 11, (rows, 7), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, count in ignored:
        targets[row, :count] = IGNORE
    return Batch(tokens[:, :-1].contiguous(), targets, (targets != IGNORE).sum(-1))


def gradients(model: Transformer) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "ignored", [[], [(0, 5)], [(0, 6), (1, 3), (5, 1)]], ids=["full windows", "one short window", "an empty window"]
)
@pytest.mark.parametrize("split", [[6], [3, 3], [2, 2, 2], [1, 5], [1] * 6])
def test_accumulation_equals_the_large_batch(ignored: list[tuple[int, int]], split: list[int]) -> None:
    """A mean of means would weigh the tokens of a window with IGNORE targets more than the others."""
    model, batch = small_model(), a_batch(6, ignored)
    logits = model(batch.inputs)
    expected_loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    expected_loss.backward()
    expected = gradients(model)
    inputs, targets = batch.inputs.split(split), batch.targets.split(split)
    parts = [Batch(i, t, (t != IGNORE).sum(-1)) for i, t in zip(inputs, targets, strict=True)]
    loss = accumulate_gradients(model, parts, CPU, torch.float32)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=0, atol=1e-6)
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@given(limit=st.floats(0.01, 10))
@settings(max_examples=20)
def test_clipping_scales_to_the_limit(limit: float) -> None:
    """It returns the norm before clipping, which the log line shows."""
    model = small_model()
    accumulate_gradients(model, [a_batch(4)], CPU, torch.float32)
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    norm = clip_gradients(model, limit)
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in before))
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    factor = min(1.0, limit / expected)
    for found, gradient in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(found, gradient * factor, rtol=1e-4, atol=1e-7)


def test_clip_0_leaves_the_gradients() -> None:
    model = small_model()
    accumulate_gradients(model, [a_batch(4)], CPU, torch.float32)
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert clip_gradients(model, 0.0).item() > 0
    assert all(a.equal(b) for a, b in zip(gradients(model), before, strict=True))


@pytest.mark.parametrize(("step", "interval", "expected"), [(6, 3, True), (7, 3, False), (5, 0, False), (1, 1, True)])
def test_what_is_due(step: int, interval: int, expected: bool) -> None:
    assert due(step, interval) is expected


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Memory, Path]:
    """What the display was shown of the twelve steps, and the run. Only to be read."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        return trained(config, folder / "run"), folder / "run"


def intervals(config: Config, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def test_a_line_is_the_mean_of_its_steps(config: Config, whole: tuple[Memory, Path], tmp_path: Path) -> None:
    """log_every only thins out the log lines; the last step always has one."""
    trained(intervals(config, log_every=5), tmp_path / "some")
    each, some = losses(whole[1]), losses(tmp_path / "some")
    assert list(some) == [5, 10, 12]
    for step, first in ((5, 1), (10, 6), (12, 11)):
        steps = [each[s] for s in range(first, step + 1)]
        assert some[step] == pytest.approx(sum(steps) / len(steps), rel=1e-6)


def test_nothing_in_between_but_always_at_the_end(config: Config, tmp_path: Path) -> None:
    """0 turns an interval off, but without a last validation and checkpoint a run would have been for nothing."""
    display = trained(intervals(config, eval_every=0, save_every=0, sample_every=0), tmp_path / "run")
    others = [(record.kind, record.step) for record in display.records if record.kind != "train"]
    assert others == [("validation", 12), ("checkpoint", 12)]
    assert list_steps(tmp_path / "run") == [12]


def test_the_display_shows_what_the_metrics_hold(whole: tuple[Memory, Path]) -> None:
    """It gets each record as it is written, one start and one finish."""
    display, run = whole
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert written[0] == {"step": 0, "kind": "schema", "version": VERSION}
    assert [json.loads(strict_json.dumps(to_json(record))) for record in display.records] == written[1:]
    assert [record["step"] for record in written if record["kind"] == "sample"] == [7]
    assert display.finished == 1
    assert (display.plan.first_step, display.plan.steps, display.plan.tokens_per_step) == (0, 12, 2 * 2 * 16)
    assert display.plan.epochs == pytest.approx(12 * 4 / math.ceil(10_799 / 16), rel=1e-2)


def test_epsilon_anneals_and_is_recorded(whole: tuple[Memory, Path]) -> None:
    """It goes from 2 at the first step to 0.1 halfway, and no further."""
    eps = [record.eps for record in whole[0].records if isinstance(record, TrainRecord)]
    assert eps[0] == 2.0
    assert eps[3] == pytest.approx(2.0**0.5 * 0.1**0.5), "step 3 of the 6 over which it anneals"
    assert eps[6:] == pytest.approx([0.1] * 6)
    assert eps == sorted(eps, reverse=True)


def test_alarms_are_recorded_once_the_warm_up_is_over(config: Config, tmp_path: Path) -> None:
    """At a temperature so high that all scores are equal, every head reads all keys alike."""
    even = with_settings(config, {"model.attn_eps": 1e6, "model.eps_anneal_start": None, "optim.warmup_steps": 2})
    display = trained(changed(even, steps=3), tmp_path / "run")
    lines = [record for record in display.records if isinstance(record, TrainRecord)]
    heads = config.model.depth * config.model.heads
    assert [len(line.alarms) for line in lines] == [0, 0, heads]
    assert {alarm.state for alarm in lines[-1].alarms} == {"spread"}


def test_a_log_line_inspects_the_beginning_of_a_long_sequence(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dense weights would take longer than a step. Query t of an even head reads t + 1 keys and the null key."""
    monkeypatch.setattr(pipeline, "MOST_INSPECTED", 5)  # of which two chunks have 2 tokens each
    even = with_settings(config, {"model.attn_eps": 1e6, "model.eps_anneal_start": None})
    (line,) = (
        line for line in trained(changed(even, steps=1), tmp_path / "run").records if isinstance(line, TrainRecord)
    )
    assert line.layers[0].effective_support == pytest.approx((2 + 3 + 4 + 5) / 4, rel=1e-3)
    monkeypatch.setattr(pipeline, "MOST_QUERIES", 2)
    (line,) = (
        line for line in trained(changed(even, steps=1), tmp_path / "some").records if isinstance(line, TrainRecord)
    )
    assert line.layers[0].effective_support == pytest.approx((3 + 5) / 2, rel=1e-3)


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Python's garbage collector looks at all objects, as in a new process. tests/conftest.py freezes most."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("unfrozen")
def test_the_garbage_collector_is_spared_what_compiling_leaves_until_the_end(config: Config, tmp_path: Path) -> None:
    frozen = []

    class Counting(Memory):
        def advance(self, step: int, seconds_left: float | None) -> None:
            frozen.append(gc.get_freeze_count())
            super().advance(step, seconds_left)

    before = gc.get_freeze_count()
    with StopRequest() as stop, pytest.raises(InterruptedRunError):
        run_training(config, Run(tmp_path / "run"), "auto", Counting(stop_after=4), stop)
    assert min(frozen) > before + 10_000
    assert gc.get_freeze_count() == before, "objects of this run would never be collected"


def test_what_the_caller_has_frozen_stays_frozen(config: Config, tmp_path: Path) -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    trained(changed(config, steps=1), tmp_path / "run")
    assert gc.get_freeze_count() > before / 2


def test_a_stop_before_the_first_step_is_saved_too(config: Config, tmp_path: Path) -> None:
    """Step 0 is a state like any other: the same command goes on from it."""

    class Impatient(Memory):
        def start(self, plan: object, history: object) -> None:
            self.advance(0, None)

    with StopRequest() as stop, pytest.raises(InterruptedRunError, match="step 0 of 12"):
        run_training(config, Run(tmp_path / "run"), "auto", Impatient(stop_after=0), stop)
    assert list_steps(tmp_path / "run") == [0]
    trained(changed(config, steps=2), tmp_path / "run")
    trained(changed(config, steps=2), tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 4])
def test_a_validation_that_a_stop_cut_short_is_made_when_the_run_goes_on(
    config: Config, tmp_path: Path, step: int
) -> None:
    """Without that of the last step a run has not finished. One that has finished validates nothing."""
    config = with_settings(changed(config, steps=4, ema_decay=0.5), {"run.eval_every": 2})
    goes_on = "; `cda train --out .*/run` goes on from there"
    with pytest.raises(InterruptedRunError, match=f"^stopped at step {step} of 4, and saved{goes_on}$"):
        trained(config, tmp_path / "run", stop_after=step)
    assert summarise(tmp_path / "run").state == "interrupted"
    trained(config, tmp_path / "run")
    whole = trained(config, tmp_path / "whole")
    assert list(Run(tmp_path / "run").records(ValidationRecord)) == [
        record for record in whole.records if isinstance(record, ValidationRecord)
    ]
    assert summarise(tmp_path / "run").state == "finished"
    assert "has all its 4 steps" in str(trained(config, tmp_path / "run").notes)
