"""What a run is built from, what is said about it beforehand, and its speed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from cda_cli.config import Config, parse
from cda_cli.errors import DataError, DeviceError
from cda_cli.training.accounting.speed import WINDOW, Speed
from cda_cli.training.setup import (
    build,
    config_warnings,
    describe_backend,
    open_data,
    resolve_backend,
    uses_compile,
    with_vocabulary,
)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"seq_len": 8, "attn_k": 8.0}, "attn_k 8 covers all 8 keys"),
        ({"seq_len": 8, "attn_k": 9.0, "null_kv": 1}, "attn_k 9 covers all 9 keys"),
        ({"dim": 8, "ff": "coordinate-descent", "ff_k": 32.0}, "ff_k 32 covers all 32 units"),
        ({"ff": "hard-topk-blocks", "ff_k": 2.0, "ff_eps": 0.1}, "a plain router lost less with --set model.ff_eps=1"),
        ({"learned_k": True, "attention": "softmax"}, "learned_k has no effect with softmax"),
        ({"learned_k": True, "attention": "hard-topk"}, "learned_k has no effect with hard-topk"),
        ({"seq_len": 8, "attn_k": 8.5, "attention": "hard-topk"}, "attn_k 8.5 covers all 8 keys"),
        ({"attn_k": 2.5, "attention": "hard-topk"}, "with attn_k 2.5 a row keeps 2"),
        ({"attn_k": 0.5, "attention": "hard-topk"}, "with attn_k 0.5 a row keeps 1"),
    ],
)
def test_what_is_hardly_meant_is_said(model: dict[str, object], words: str) -> None:
    [sentence] = config_warnings(parse({"model": model}))
    assert words in sentence


def test_a_run_that_ends_in_its_warm_up_is_told() -> None:
    optim = {"steps": 50, "warmup_steps": 50}
    assert config_warnings(parse({"optim": optim})) == []
    assert config_warnings(parse({"optim": optim | {"steps": 20, "schedule_steps": 50}})) == [], "a trunk has forks"
    assert config_warnings(parse({"optim": optim | {"schedule_steps": 20}})) == [], "the warm-up is not cut by it"
    [sentence] = config_warnings(parse({"optim": optim | {"steps": 49}}))
    assert sentence.startswith("the warm-up of 50 steps is longer than the run of 49")


@pytest.mark.parametrize(
    "model",
    [
        {"seq_len": 8, "attn_k": 8.0, "null_kv": 1},
        {"seq_len": 8, "attn_k": 99.0, "attention": "softmax"},
        {"seq_len": 8, "attn_k": 99.0, "attention": "tempered-softmax"},
        {"seq_len": 8, "attn_k": 99.0, "attention": "entmax"},
        {"attn_k": 3.0, "attention": "hard-topk"},
        {"dim": 8, "ff_k": 99.0},
        {"ff": "hard-topk-blocks", "ff_k": 2.0, "ff_eps": 1.0},
        {"learned_k": True},
    ],
)
def test_nothing_is_said_without_cause(model: dict[str, object]) -> None:
    """A warning about a setting that has no effect here teaches people to pass over warnings."""
    assert config_warnings(parse({"model": model})) == []


def test_the_backend_is_described_with_its_reason(config: Config) -> None:
    softmax = {"attention": "softmax", "ff": "gelu"}

    def said(settings: dict[str, object]) -> str:
        config = parse(settings)
        return describe_backend(config, resolve_backend(config, torch.device("cpu")))

    assert "SDPA" in said({"model": softmax})
    assert "exact solver" in said({"model": {**softmax, "ff": "coordinate-descent"}})
    asked = {"model": {"solver": "iterative"}, "run": {"backend": "colt5"}}
    assert said(asked) == "colt5, iterative solver (asked for)"
    data = open_data(config, show_progress=False)
    for model in ({}, softmax):  # forced, it is an error before any work, though no layer selects
        with pytest.raises(DeviceError, match="no exact solver"):
            build(parse({"model": model, "run": {"backend": "colt5", "device": "cpu"}}), data)


@pytest.mark.parametrize(
    ("model", "compiled"),
    [({}, True), ({"attention": "softmax"}, True), ({"solver": "iterative"}, False)],
)
def test_an_eps_that_anneals_is_compiled_where_it_is_no_constant(model: dict[str, object], compiled: bool) -> None:
    """The iterative solver would compile at every step, so it says that it does not."""
    said: list[str] = []
    asked = parse({"model": {"eps_anneal_start": 2.0, **model}, "run": {"compile": True}})
    assert uses_compile(asked, torch.device("cpu"), said.append) is compiled
    assert said == ([] if compiled else ["torch.compile is off: an ε that changes every step would compile every step"])


def test_the_seed_is_that_of_the_weights(config: Config) -> None:
    """Two runs with the same seed start from the same weights, and with two seeds from different ones."""
    weights = []
    for seed in (3, 3, 4):
        seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        _, state = build(seeded, open_data(seeded, show_progress=False))
        weights.append(state.model.token_embedding.weight.detach())
        assert (state.step, state.tokens, state.position) == (0, 0, None)
        assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_the_vocabulary_is_the_tokenizer_s(config: Config) -> None:
    """A model with fewer rows than the tokenizer has tokens would fail at the first rare token."""
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 2})})
    assert with_vocabulary(narrow, open_data(narrow, show_progress=False)).model.vocab_size == 256


def test_a_streamed_text_is_opened_once(tmp_path: Path) -> None:
    """Opening may list a folder, read thousands of files or ask a hub, and a file that is new must not be half in."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("some words to train on " * (number + 1))
    config = parse({
        "model": {"seq_len": 8},
        "data": {"source": str(tmp_path), "streaming": True, "validation_fraction": 0.3},
        "run": {"eval_batches": 1},
    })  # fmt: skip
    data = open_data(config, show_progress=False)
    (tmp_path / "40.txt").write_text("a file that came later")
    _, state = next(iter(data.open_batches(None)))
    assert state["data"] == next(iter(data.open_batches(None)))[1]["data"]
    _, later = next(iter(open_data(config, show_progress=False).open_batches(None)))
    assert state["data"] != later["data"], "the position is that of a text which another opening found"


def test_a_side_that_is_too_short_is_named(config: Config) -> None:
    """The error comes at the start, not at the first validation."""
    long = config.model_copy(update={"model": config.model.model_copy(update={"seq_len": 2000})})
    with pytest.raises(DataError, match=r"the validation is shorter.*validation_fraction"):
        open_data(long, show_progress=False)


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_speed_is_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and saving do not count."""
    clock = Clock(monkeypatch)
    speed = Speed()
    assert speed.tokens_per_second == speed.data_wait == 0
    assert speed.seconds_left(5) is None
    clock.now = 100.0
    speed.add(50)
    assert speed.tokens_per_second == 0.5, "better than nothing"
    speed.mark()
    assert speed.tokens_per_second == 0.5, "no step since"
    clock.now = 102.0
    with speed.paused():
        clock.now = 1000.0
    clock.now += 3.0
    for _ in range(10):
        speed.add(50)
    speed.mark()
    assert speed.tokens_per_second == 100
    assert speed.seconds_left(4) == 2.0


def test_speed_is_right_in_the_first_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """That holds after a resume too: the step that compiles says nothing about the steps to come."""
    clock = Clock(monkeypatch)
    speed = Speed()
    for seconds in [60.0] + [0.5] * 9:
        clock.now += seconds
        speed.add(10)
    speed.mark()
    assert speed.tokens_per_second == 20
    assert speed.seconds_left(100) == 50


def test_speed_follows_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured over a window, not since the start."""
    clock = Clock(monkeypatch)
    speed = Speed()
    for seconds in [1.0] * 50 + [4.0] * WINDOW:
        clock.now += seconds
        speed.add(8)
        speed.mark()
    assert speed.tokens_per_second == 2


def test_the_time_that_is_left_follows_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute or some long steps after a change it has the new pace, however far apart the log lines are."""
    clock = Clock(monkeypatch)
    speed = Speed()
    for seconds in [60.0] + [0.25] * 4000 + [1.0] * 60:
        clock.now += seconds
        speed.add(8)
    assert speed.seconds_left(100) == pytest.approx(100, rel=0.05)
    for _ in range(8):
        clock.now += 60
        speed.add(8)
    assert speed.seconds_left(1) == pytest.approx(60, rel=0.05)


def test_one_long_step_does_not_make_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was asleep for an hour goes on as before."""
    clock = Clock(monkeypatch)
    speed = Speed()
    for seconds in [1.0] * 50 + [3600.0] + [1.0] * 100:
        clock.now += seconds
        speed.add(8)
    assert speed.seconds_left(10) == pytest.approx(10, rel=0.5)


def test_the_wait_for_data_is_a_share_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    speed = Speed()
    for _ in range(5):
        with speed.waiting():
            clock.now += 1.0
        clock.now += 3.0
        speed.add(8)
    speed.mark()
    assert speed.data_wait == 0.25


def test_activation_checkpointing_is_asked_for(config: Config) -> None:
    asked = config.model_copy(update={"run": config.run.model_copy(update={"activation_checkpointing": True})})
    for each, expected in ((config, False), (asked, True)):
        _, state = build(each, open_data(each, show_progress=False))
        assert state.model.activation_checkpointing is expected
