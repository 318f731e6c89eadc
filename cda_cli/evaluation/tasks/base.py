"""What every evaluation task has in common: a task scores a model, and gives its metrics by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cda_cli.evaluation.loglikelihood import Loglikelihood, TokenPair, loglikelihoods
from cda_cli.restore import Restored

Advance = Callable[[int], None]  # gets the number of requests that were done


def no_progress(what: str, total: int) -> Advance:
    return lambda done: None


@dataclass(frozen=True)
class Scorer:
    """A model, as tasks use it. `dtype` is that of the matrix products, and `batch_size` counts rows.

    `progress` is called with the name and the number of the requests that come next, and returns what advances them.
    """

    restored: Restored
    dtype: torch.dtype
    batch_size: int = 16
    progress: Callable[[str, int], Advance] = no_progress

    def loglikelihoods(self, what: str, pairs: Sequence[TokenPair]) -> list[Loglikelihood]:
        """Scores the pairs of the task `what` (see `loglikelihood.loglikelihoods`)."""
        advance = self.progress(what, len(pairs))
        model, device = self.restored.model, self.restored.device
        return loglikelihoods(model, pairs, self.batch_size, device, self.dtype, advance)

    @property
    def prefix(self) -> list[int]:
        """What stands before a text of which nothing else is known."""
        return [self.restored.tokenizer.prefix]


@dataclass(frozen=True)
class TaskResult:
    """What a model scored in a task.

    `metrics` maps "METRIC,FILTER" to a number, and "METRIC_stderr,FILTER" to its standard error, as the JSON of
    lm-evaluation-harness does; a number is None where there is none. `higher_is_better` is by METRIC. `truncated`
    counts the requests of which the model could not see the whole context.
    """

    task: str
    version: str
    num_fewshot: int | None
    documents: int
    metrics: dict[str, float | None]
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)
    truncated: int = 0


class EvaluationTask(ABC):
    """A task with its data and settings."""

    name: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns, as plain JSON, all that decides the result but the model: the data, the settings, the version."""

    @abstractmethod
    def run(self, scorer: Scorer) -> TaskResult:
        """Scores a model. Raises CdaError."""


Summary = Callable[[Mapping[str, TaskResult]], TaskResult]


@dataclass
class Selection:
    """The tasks that were asked for, by name, and the summaries of several of them, such as the groups."""

    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)

    def add(self, other: Selection) -> None:
        self.tasks |= other.tasks
        self.summaries |= other.summaries
