"""Scores in synthetic tasks: those of models whose answers are known, of the solver, and of answers to others."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cda_cli.config import Config, parse
from cda_cli.data import TASKS, Task, parse_task, task_examples, task_tokenizer
from cda_cli.errors import ConfigError, DataError
from cda_cli.evaluation.intervals import wilson_interval
from cda_cli.evaluation.tasks import Scorer, TaskOptions, TaskResult, draw_lengths, find_tasks
from cda_cli.generation import SamplingSettings, generate
from cda_cli.model import Transformer
from cda_cli.restore import Restored, own_task
from cda_cli.training.optimizer import build_optimizer

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs"
SIZES: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "position": "rotary", "tied_embeddings": True}


def restored(source: str, model: nn.Module | None = None, seq_len: int | None = None) -> Restored:
    """A model for a task, of random weights where none is given."""
    task = parse_task(source)
    tokenizer = task_tokenizer(task)
    sizes = {"vocab_size": tokenizer.vocab_size, "seq_len": seq_len or task.tokens_of(task.length.most), **SIZES}
    config: Config = parse({"model": sizes, "data": {"source": source}})
    torch.manual_seed(0)
    built: Any = model or Transformer(config.model)
    return Restored(built.eval(), config, tokenizer, {}, Path("run"), CPU)


def scored(
    which: Restored, names: list[str], lengths: tuple[int, ...], examples: int, batch_size: int = 16
) -> list[TaskResult]:
    options = TaskOptions(limit=examples, lengths=lengths, own=own_task(which.config))
    scorer = Scorer(which, torch.float32, batch_size)
    return [task.run(scorer) for task in find_tasks(names, options).tasks.values()]


class Answering(nn.Module):
    """Says what `change` makes of the right answer to each input [B, T]."""

    def __init__(self, task: Task, change: Callable[[np.ndarray[Any, Any]], None] = lambda tokens: None) -> None:
        super().__init__()
        self.task, self.change = task, change

    def forward(self, inputs: Tensor) -> Tensor:
        rows = []
        for row in inputs.numpy():
            whole = np.append(row, self.task.word("<eos>"))
            is_answer = np.arange(len(whole)) > int(np.flatnonzero(whole == self.task.word("<sep>"))[0])
            said = self.task.solve(np.where(is_answer, -1, whole))
            self.change(said)
            rows.append(said[1:])
        return nn.functional.one_hot(torch.tensor(np.stack(rows)), self.task.word("<eos>") + 1).float()


@pytest.mark.parametrize("name", ["copy", "reverse", "sort"])
def test_a_model_that_solves_the_task_scores_all_of_it(name: str) -> None:
    source = f"task:{name}?length=5&vocab=9"
    (found,) = scored(restored(source, Answering(parse_task(source))), [source], (), 40)
    assert (found.task, found.length, found.documents) == (f"task:{name}?vocab=9", 5, 40)
    assert [found.metrics[f"{name},none"] for name in ("exact_match", "token_accuracy")] == [1.0, 1.0]
    assert [found.metrics[f"exact_match_{end},none"] for end in ("lo", "hi")] == list(wilson_interval(1.0, 40))


def test_one_wrong_token_spoils_an_answer_and_no_more() -> None:
    """The answers are five symbols and <eos>."""
    source = "task:sort?length=5&vocab=9"

    def wrong(tokens: np.ndarray[Any, Any]) -> None:
        tokens[-1] = 0

    (found,) = scored(restored(source, Answering(parse_task(source), wrong)), [source], (), 40)
    assert found.metrics["exact_match,none"] == 0.0
    assert found.metrics["token_accuracy,none"] == pytest.approx(5 / 6)
    assert found.metrics["token_accuracy_stderr,none"] == pytest.approx(0)
    assert found.metrics["solver_exact_match,none"] == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_the_solver_scores_all_of_every_task_at_every_length(name: str) -> None:
    results = scored(restored(f"task:{name}", seq_len=512), [f"task:{name}"], (64, 192), 4)
    assert [result.length for result in results] == [64, 192]
    assert [result.metrics["solver_exact_match,none"] for result in results] == [1.0, 1.0]


def sort_chance(length: int, vocab: int) -> float:
    """How often two sorted sequences agree at a place, by the distribution of order statistics, <eos> included."""
    agree = 0.0
    for place in range(1, length + 1):
        upto = [
            sum(math.comb(length, k) * p**k * (1 - p) ** (length - k) for k in range(place, length + 1))
            for p in (symbol / vocab for symbol in range(vocab + 1))
        ]
        agree += sum((high - low) ** 2 for low, high in itertools.pairwise(upto))
    return (agree + 1) / (length + 1)


CHANCE = {  # how often a token of an answer is that of another example
    "task:copy?length=9&vocab=6": (9 / 6 + 1) / 10,
    "task:reverse?length=9&vocab=6": (9 / 6 + 1) / 10,
    "task:sort?length=9&vocab=6": sort_chance(9, 6),
    "task:mqar?length=32&vocab=12&density=0.25": 1 / 6,
    "task:mqmtar?length=24&vocab=6&words=36&queries=2": (4 / 6 + 3) / 7,
    "task:needle?length=20&vocab=6&passkey=3": (3 / 6 + 1) / 4,
    "task:induction?length=20&vocab=6": 1 / 6,
}


@pytest.mark.parametrize("source", CHANCE)
def test_the_answers_to_other_examples_are_right_by_chance(source: str) -> None:
    """If prompts had no answers of their own, shuffled answers above chance would give it away."""
    answer = task_examples(parse_task(source), 0, 1000).answer
    each = (np.roll(answer, 1, axis=0) == answer).mean(1)
    # Each example is in two pairs: their errors may add up to √3 times those of independent ones.
    error = math.sqrt(3) * each.std() / math.sqrt(len(each))
    assert abs(each.mean() - CHANCE[source]) < 4 * error, f"{each.mean()} and {CHANCE[source]}, error {error}"
    (found,) = scored(restored(source), [source], (), 1000, batch_size=500)
    exact, tokens = (found.metrics[f"shuffled_{name},none"] for name in ("exact_match", "token_accuracy"))
    assert tokens == pytest.approx(each.mean())
    assert exact == pytest.approx((each == 1).mean())


def test_the_pages_define_each_figure() -> None:
    (found,) = scored(restored("task:sort?length=3"), ["task:sort"], (), 2)
    page = (DOCS / "tasks.md").read_text(encoding="utf-8")
    metrics = {re.sub("(_stderr|_lo|_hi)?,none$", "", metric) for metric in found.metrics}
    assert [metric for metric in sorted(metrics) if f"`{metric}`" not in page] == []
    page = (DOCS / "evaluation-tasks.md").read_text(encoding="utf-8")
    assert [field for field in vars(found) if f"`{field}`" not in page] == []


def test_a_single_example_has_no_other() -> None:
    (found,) = scored(restored("task:sort?length=3"), ["task:sort"], (), 1)
    assert found.metrics["shuffled_exact_match,none"] is None
    assert found.metrics["exact_match_stderr,none"] is None


def test_exact_match_is_that_of_free_greedy_decoding() -> None:
    """A model that has learned some of a small task, so that both answers occur."""
    source = "task:sort?length=3&vocab=4"
    which, task = restored(source), parse_task(source)
    model = which.model.train()
    optimizer = build_optimizer(model, which.config.optim)
    for step in range(60):
        drawn = [task.example("train", 0, 32 * step + row) for row in range(32)]
        tokens = torch.from_numpy(np.stack([example.tokens for example in drawn]))
        targets = tokens[:, 1:].masked_fill(~torch.from_numpy(np.stack([one.is_answer for one in drawn]))[:, 1:], -100)
        loss = model(tokens[:, :-1], targets_BT=targets).sum() / (targets != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    (found,) = scored(which, [source], (), 60)
    examples, free = task_examples(task, 0, 60), 0
    for of_one, answer in zip(examples.tokens, examples.answer, strict=True):
        prompt, greedy = of_one[: -len(answer)].tolist(), SamplingSettings(temperature=0.0)
        said = list(generate(model, prompt, len(answer), greedy, seed=0, dtype=torch.float32))
        free += said == answer.tolist()
    exact = found.metrics["exact_match,none"]
    assert exact == free / 60
    assert 0 < exact < 1, "the model has learned too much or too little to tell the two apart"


def test_the_size_of_a_batch_changes_nothing() -> None:
    which = restored("task:sort?length=6&vocab=5", seq_len=27)
    assert scored(which, ["task:sort"], (6, 12), 30, 1) == scored(which, ["task:sort"], (6, 12), 30, 30)


def test_what_a_name_leaves_out_is_as_in_the_run() -> None:
    which = restored("task:sort?length=4..7&vocab=5")
    options = TaskOptions(own=own_task(which.config))
    assert list(find_tasks(["task:sort", "task:copy"], options).tasks) == [
        "task:sort?length=7&vocab=5", "task:copy?length=64&vocab=5",
    ]  # fmt: skip
    with pytest.raises(DataError, match="the model was not trained on the 6 symbols of task:sort"):
        scored(which, ["task:sort?vocab=6"], (), 2)


def test_a_length_that_a_task_has_not_is_refused() -> None:
    with pytest.raises(DataError, match="task:needle has no example of length 4: a passkey of 5 takes a length of 6"):
        find_tasks(["task:needle"], TaskOptions(lengths=[4]))
    with pytest.raises(DataError, match="task:sort has no example of length 0"):
        find_tasks(["task:sort"], TaskOptions(lengths=[0]))
    with pytest.raises(ConfigError, match=r"takes 2,000,000,000 tokens.*; give smaller --lengths"):
        find_tasks(["task:sort"], TaskOptions(lengths=[999_999_999]))


def test_lengths_and_pictures_are_of_synthetic_tasks(tmp_path: Path) -> None:
    (tmp_path / "core.yaml").write_text("icl_tasks: []")
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n")
    with pytest.raises(ConfigError, match="--lengths is about synthetic tasks"):
        find_tasks([f"core:{tmp_path}"], TaskOptions(lengths=[8]))
    with pytest.raises(ConfigError, match="--plot draws synthetic tasks by length"):
        find_tasks([f"core:{tmp_path}"]).require_lengths("--plot")


def test_the_picture_has_a_line_for_each_accuracy(tmp_path: Path) -> None:
    which, picture = restored("task:sort?length=4&vocab=5", seq_len=19), tmp_path / "lengths.svg"
    found = {str(one.length): one for one in scored(which, ["task:sort"], (2, 4, 8), 3)}
    draw_lengths(picture, [found, found])
    content = picture.read_text(encoding="utf-8")
    for words in ("accuracy in task:sort?vocab=5", "checkpoint 1, exact match", "checkpoint 2, tokens", "by chance"):
        assert words in content


@given(st.integers(1, 400), st.data())
def test_the_interval_of_wilson_holds_the_shares_that_are_within_its_error(count: int, data: st.DataObject) -> None:
    """Its ends are the shares p with |share − p| = z·√(p(1 − p)/count)."""
    share = data.draw(st.integers(0, count)) / count
    for end in wilson_interval(share, count):
        assert 0 <= end <= 1
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)
