"""What every evaluation task has in common: a task scores a model, and gives its metrics by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cda_cli.data import Task
from cda_cli.errors import ConfigError
from cda_cli.evaluation.loglikelihood import Loglikelihood, TokenPair, loglikelihoods
from cda_cli.restore import Restored, Saved

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
    counts the requests of which the model could not see the whole context. `length` is that of the examples of a
    synthetic task.
    """

    task: str
    version: str
    num_fewshot: int | None
    documents: int
    metrics: dict[str, float | None]
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)
    truncated: int = 0
    length: int | None = None


class EvaluationTask(ABC):
    """A task with its data and settings.

    `context` is the number of tokens that a model must take, if a text must not be cut, and `length` that of the
    examples of a synthetic task.
    """

    name: str
    context: int = 0
    length: int | None = None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns, as plain JSON, all that decides the result but the model: the data, the settings, the version."""

    def check(self, saved: Saved) -> None:
        """Raises CdaError if the model of a checkpoint cannot take the examples at all."""
        model = saved.config.model
        if model.position == "learned" and self.context > model.seq_len:
            raise ConfigError(
                f"{saved.path} has learned positions for {model.seq_len} tokens, and {self.name} takes {self.context}; "
                "give smaller --lengths, or train with rotary positions"
            )

    @abstractmethod
    def run(self, scorer: Scorer) -> TaskResult:
        """Scores a model. Raises CdaError."""


@dataclass(frozen=True)
class TaskOptions:
    """What decides the tasks besides their names. No field acts on tasks that have nothing of the kind.

    `include` is a folder of YAML files of lm-evaluation-harness. `num_fewshot` takes the place of the number of the
    tasks, unless that is 0. Only the first `limit` documents of each task count. Synthetic tasks have examples of each
    of `lengths`, and share with `own`, the task that the model was trained on, what their names leave out.
    """

    include: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    lengths: Sequence[int] = ()
    own: Task | None = None


Summary = Callable[[Mapping[str, TaskResult]], TaskResult]


@dataclass
class Selection:
    """The tasks that were asked for, by name, and the summaries of several of them, such as the groups."""

    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """The number of tokens that a model must take for all of the tasks."""
        return max((task.context for task in self.tasks.values()), default=0)

    def require_lengths(self, option: str) -> None:
        """Raises ConfigError, naming `option`, if no task has examples of a length."""
        if not any(task.length is not None for task in self.tasks.values()):
            raise ConfigError(f"{option} draws synthetic tasks by length; name one with --tasks, such as task:sort")

    def check(self, saved: Saved) -> None:
        """Raises CdaError if the model of a checkpoint cannot take the examples of one of the tasks."""
        for task in self.tasks.values():
            task.check(saved)

    def add(self, other: Selection) -> None:
        self.tasks |= other.tasks
        self.summaries |= other.summaries
