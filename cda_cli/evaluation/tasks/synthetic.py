"""Synthetic tasks by length: how many answers are right, of the model, of an exact solver and by chance.

Shapes: E examples, N tokens of each, A tokens of its answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cda_cli.data import Task, check_task_tokenizer, parse_task, task_examples, task_of_length
from cda_cli.data.task_rows import VALIDATION_SEED
from cda_cli.data.tasks import PREFIX
from cda_cli.errors import ConfigError
from cda_cli.evaluation.intervals import wilson_interval
from cda_cli.evaluation.tasks.base import EvaluationTask, Scorer, Selection, TaskOptions, TaskResult
from cda_cli.restore import Saved
from cda_cli.runtime import autocast

EXAMPLES = 1000  # of each length, as in the published tables
LONGEST = 2**20  # tokens of an example; a batch of longer ones fills the memory

Ints = NDArray[np.int64]


class SyntheticTask(EvaluationTask):
    """The first `examples` examples of one length, which are those of the validation side.

    `exact_match` is the share of examples whose whole answer is right, and `token_accuracy` the share of the tokens of
    the answers. Each token is the likeliest after the right ones before it. That is exact for `exact_match`: free
    greedy decoding gives the whole answer if and only if each of its tokens is the likeliest after the right ones.

    `solver_exact_match` is that of an exact algorithm: 1, or the examples would be ambiguous. `shuffled_exact_match`
    and `shuffled_token_accuracy` are those of the answers to other examples, which are right by chance alone.
    """

    def __init__(self, task: Task, examples: int) -> None:
        self._task, self._examples, self.length = task, examples, task.length.most
        parameters = task.model_dump(mode="json", exclude_defaults=True)
        parameters.pop("length", None)
        self._label = task.spec_of(parameters)
        self.name = task.spec_of({"length": self.length, **parameters})
        self.context = task.tokens_of(self.length) - 1

    def identity(self) -> dict[str, Any]:
        return {"kind": "synthetic", "task": self._task.spec, "seed": VALIDATION_SEED, "examples": self._examples}

    def check(self, saved: Saved) -> None:
        super().check(saved)
        check_task_tokenizer(self._task, saved.tokenizer, str(saved.path))

    def run(self, scorer: Scorer) -> TaskResult:
        check_task_tokenizer(self._task, scorer.restored.tokenizer)
        advance = scorer.progress(self.name, self._examples)
        answers: list[tuple[Ints, Ints, Ints]] = []
        for first in range(0, self._examples, scorer.batch_size):
            examples = task_examples(self._task, first, min(scorer.batch_size, self._examples - first))
            solved = np.stack([self._task.solve(hidden) for hidden in examples.hidden])
            predicted = _likeliest(scorer, examples.tokens)
            answers.append((examples.answer, examples.answer_in(predicted), examples.answer_in(solved)))
            advance(len(examples.tokens))
        metrics = _metrics(*map(np.concatenate, zip(*answers, strict=True)))
        return TaskResult(
            task=self._label,
            version="N/A",
            num_fewshot=0,
            documents=self._examples,
            metrics=metrics,
            higher_is_better={"exact_match": True, "token_accuracy": True},
            length=self.length,
        )


def find_synthetic_tasks(names: Sequence[str], options: TaskOptions) -> Selection:
    """Makes a task of each name, at each of the lengths; without any, at the longest of the task.

    Raises DataError if there is no such task or length, and ConfigError for examples that are too long.
    """
    selection = Selection()
    for name in names:
        task = parse_task(PREFIX + name, options.own)
        for length in options.lengths or [task.length.most]:
            found = SyntheticTask(task_of_length(task, length), options.limit or EXAMPLES)
            if found.context > LONGEST:
                raise ConfigError(
                    f"an example of {found.name} takes {found.context:,} tokens, and at most {LONGEST:,} are scored; "
                    "give smaller --lengths"
                )
            selection.tasks[found.name] = found
    return selection


def parse_lengths(text: str) -> list[int]:
    """Reads `--lengths`, such as 64,128,256. Raises ConfigError for what is no length."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < len(part) < 10 for part in parts):
        raise ConfigError(f"--lengths {text} names no lengths; give whole numbers with commas, such as 64,128,256")
    return list(map(int, parts))


@torch.no_grad()
def _likeliest(scorer: Scorer, tokens: Ints) -> Ints:
    """The likeliest token [E, N] at each place, after the `tokens` [E, N] before it; the first is not predicted."""
    inputs = torch.from_numpy(tokens[:, :-1]).to(scorer.restored.device)
    with autocast(scorer.restored.device, scorer.dtype):
        found: Ints = scorer.restored.model(inputs).argmax(-1).cpu().numpy()
    return np.pad(found, ((0, 0), (1, 0)))


def _metrics(right: Ints, predicted: Ints, solved: Ints) -> dict[str, float | None]:
    """The metrics of answers [E, A]: the right ones, those of the model and those of the solver."""
    is_right = predicted == right
    by_chance = np.roll(right, 1, axis=0) == right if len(right) > 1 else None
    exact_match = float(is_right.all(1).mean())
    low, high = wilson_interval(exact_match, len(right))
    return {
        "exact_match,none": exact_match,
        "exact_match_stderr,none": _error(is_right.all(1)),
        "exact_match_lo,none": low,
        "exact_match_hi,none": high,
        "token_accuracy,none": float(is_right.mean()),
        "token_accuracy_stderr,none": _error(is_right.mean(1)),
        "solver_exact_match,none": float((solved == right).all(1).mean()),
        "shuffled_exact_match,none": None if by_chance is None else float(by_chance.all(1).mean()),
        "shuffled_token_accuracy,none": None if by_chance is None else float(by_chance.mean()),
    }


def _error(shares: NDArray[Any]) -> float | None:
    """The standard error of the mean of shares [E] of independent examples."""
    return float(shares.std(ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else None
