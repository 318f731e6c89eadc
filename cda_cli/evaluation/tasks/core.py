"""Tasks in a folder of the CORE format of nanochat, which holds those of DCLM (arXiv:2406.11794). It is read, never
fetched.

    DIR/core.yaml            icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
    DIR/eval_meta_data.csv   the column "Random baseline", in per cent, by "Eval Task"
    DIR/eval_data/…          the JSON lines that each dataset_uri names

Order, few-shot examples, prompts and scores are those of nanochat/core_eval.py and scripts/base_eval.py.
"""

from __future__ import annotations

import csv
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cda_cli import strict_yaml
from cda_cli.errors import ConfigError, DataError, brief, did_you_mean, requirement
from cda_cli.evaluation.loglikelihood import Loglikelihood, TokenPair
from cda_cli.evaluation.tasks.base import EvaluationTask, Scorer, Selection, TaskOptions, TaskResult
from cda_cli.plurals import counted
from cda_cli.storage import sha256_of

ORDER_SEED, EXAMPLE_SEED = 1337, 1234
SUMMARY = "CORE"


class Item(BaseModel, ABC):
    """A line of a task."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    @abstractmethod
    def example(self, delimiter: str) -> str:
        """Writes the item with its answer, as a few-shot example."""

    @abstractmethod
    def prompts(self, shots: str, delimiter: str) -> list[str]:
        """The texts that are scored, behind the few-shot examples `shots`."""

    @abstractmethod
    def pairs(self, prompts: list[list[int]]) -> list[TokenPair]:
        """Cuts the tokens of the prompts where what is predicted begins. At least one token is predicted."""

    @abstractmethod
    def is_correct(self, scored: Sequence[Loglikelihood]) -> bool:
        """Judges the item by the scores of its pairs."""


class _WithOptions(Item):
    """Several prompts, of which the one with the lowest mean loss of its predicted tokens is chosen."""

    gold: int = Field(ge=0)
    options: ClassVar[str]

    @model_validator(mode="after")
    def _gold_is_an_option(self) -> _WithOptions:
        if self.gold >= len(getattr(self, self.options)):
            raise ValueError(f"gold must be the index of one of the {self.options}")
        return self

    def is_correct(self, scored: Sequence[Loglikelihood]) -> bool:
        losses = [-one.nats / one.tokens for one in scored]
        return losses.index(min(losses)) == self.gold


class MultipleChoice(_WithOptions):
    """A query and its choices. What is predicted begins where the choices depart from each other."""

    query: str
    choices: list[str]
    options = "choices"

    def example(self, delimiter: str) -> str:
        return f"{self.query}{delimiter}{self.choices[self.gold]}"

    def prompts(self, shots: str, delimiter: str) -> list[str]:
        return [f"{shots}{self.query}{delimiter}{choice}" for choice in self.choices]

    def pairs(self, prompts: list[list[int]]) -> list[TokenPair]:
        first = min(_common_length(prompts), _shortest(prompts) - 1)
        return [(tokens[:first], tokens[first:]) for tokens in prompts]


class Schema(_WithOptions):
    """A continuation and the contexts that it might have. The tokens that all prompts end with are predicted."""

    context_options: list[str]
    continuation: str
    options = "context_options"

    def example(self, delimiter: str) -> str:
        return f"{self.context_options[self.gold]}{delimiter}{self.continuation}"

    def prompts(self, shots: str, delimiter: str) -> list[str]:
        return [f"{shots}{context}{delimiter}{self.continuation}" for context in self.context_options]

    def pairs(self, prompts: list[list[int]]) -> list[TokenPair]:
        common = _common_length([tokens[::-1] for tokens in prompts])
        last = max(1, min(common, _shortest(prompts) - 1))
        return [(tokens[:-last], tokens[-last:]) for tokens in prompts]


class LanguageModeling(Item):
    """A context and its continuation, of which each token must be the likeliest."""

    context: str
    continuation: str

    def example(self, delimiter: str) -> str:
        return f"{self.context.strip()}{delimiter}{self.continuation}"

    def prompts(self, shots: str, delimiter: str) -> list[str]:
        before = f"{shots}{self.context.strip()}{delimiter}"
        return [before.strip(), f"{before}{self.continuation}"]

    def pairs(self, prompts: list[list[int]]) -> list[TokenPair]:
        before, whole = prompts
        first = min(_common_length([before, whole]), len(whole) - 1)
        return [(whole[:first], whole[first:])]

    def is_correct(self, scored: Sequence[Loglikelihood]) -> bool:
        return scored[0].is_greedy


KINDS: dict[str, type[Item]] = {
    "multiple_choice": MultipleChoice,
    "schema": Schema,
    "language_modeling": LanguageModeling,
}


class Entry(BaseModel):
    """A task of core.yaml. Of several numbers of few-shot examples the first is taken."""

    label: str
    dataset_uri: str
    icl_task_type: str
    num_fewshot: list[int] = Field(min_length=1)
    continuation_delimiter: str = " "


class CoreTask(EvaluationTask):
    """A task of a CORE folder. `baseline` is the accuracy of chance."""

    def __init__(self, folder: Path, entry: Entry, baseline: float, num_fewshot: int | None, limit: int | None) -> None:
        self.name = f"core:{entry.label}"
        self._kind, self._baseline, self._limit = KINDS[entry.icl_task_type], baseline, limit
        self._delimiter = entry.continuation_delimiter
        self._num_fewshot = entry.num_fewshot[0] if num_fewshot is None else num_fewshot
        self._file = folder / "eval_data" / entry.dataset_uri
        if not self._file.is_file():
            raise DataError(f"{folder}/core.yaml names {self._file}, which is not there; put it back")

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "core",
            "type": self._kind.__name__,
            "delimiter": self._delimiter,
            "baseline": self._baseline,
            "num_fewshot": self._num_fewshot,
            "limit": self._limit,
            "data": sha256_of(self._file),
        }

    def run(self, scorer: Scorer) -> TaskResult:
        items = self._items()
        pairs: list[TokenPair] = []
        ends: list[int] = []
        for index, item in enumerate(items):
            shots = "".join(f"{other.example(self._delimiter)}\n\n" for other in self._few_shot(items, index))
            prompts = item.prompts(shots, self._delimiter)
            encode = scorer.restored.tokenizer.encode
            pairs += item.pairs([[*scorer.prefix, *encode(prompt).tolist()] for prompt in prompts])
            ends.append(len(pairs))
        scored = scorer.loglikelihoods(self.name, pairs)
        starts = [0, *ends[:-1]]
        correct = [item.is_correct(scored[start:end]) for item, start, end in zip(items, starts, ends, strict=True)]
        accuracy, count = sum(correct) / len(correct), len(correct)
        error = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
        metrics = {
            "acc,none": accuracy,
            "acc_stderr,none": error,
            "acc_centered,none": (accuracy - self._baseline) / (1 - self._baseline),
            "acc_centered_stderr,none": None if error is None else error / (1 - self._baseline),
        }
        return TaskResult(
            task=self.name,
            version="N/A",
            num_fewshot=self._num_fewshot,
            documents=count,
            metrics=metrics,
            higher_is_better={"acc": True, "acc_centered": True},
            truncated=sum(one.is_truncated for one in scored),
        )

    def _items(self) -> list[Item]:
        """The items in the order in which they are taken, and from which few-shot examples are drawn."""
        items = []
        try:
            lines = self._file.read_bytes().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._file} cannot be read ({brief(error)}); put the file of the bundle back") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                items.append(_parsed(self._kind, line, f"line {number} of {self._file}"))
        random.Random(ORDER_SEED).shuffle(items)
        items = items[: self._limit]
        if len(items) <= self._num_fewshot:
            raise DataError(
                f"{self.name} draws {counted(self._num_fewshot, 'example')} from its other documents, of which there "
                f"are {counted(len(items), 'document')} in all; raise --limit, or lower --num-fewshot"
            )
        return items

    def _few_shot(self, items: Sequence[Item], index: int) -> list[Item]:
        others = [place for place in range(len(items)) if place != index]
        return [items[place] for place in random.Random(EXAMPLE_SEED + index).sample(others, self._num_fewshot)]


def find_core_tasks(places: Sequence[str], options: TaskOptions) -> Selection:
    """Reads the tasks of each folder of `places`. Raises ConfigError and DataError for what is no CORE folder."""
    selection = Selection()
    for place in places:
        folder = Path(place).expanduser()
        entries, baselines = _entries(folder), _baselines(folder)
        for entry in entries:
            if entry.label not in baselines:
                raise DataError(f"{folder}/eval_meta_data.csv has no Random baseline of {entry.label}; add its row")
            task = CoreTask(folder, entry, baselines[entry.label], options.num_fewshot, options.limit)
            selection.tasks[task.name] = task
        selection.summaries[SUMMARY] = _summarise
    return selection


def _summarise(results: Mapping[str, TaskResult]) -> TaskResult:
    """The CORE metric: the mean of the centred accuracies of all tasks, whose errors are independent."""
    members = [one for name, one in results.items() if name.startswith("core:")]
    centred = [one.metrics["acc_centered,none"] or 0.0 for one in members]
    # The result of an earlier version has no standard error.
    errors = [one.metrics.get("acc_centered_stderr,none") for one in members]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(members) if len(known) == len(members) else None
    return TaskResult(
        task=SUMMARY,
        version="N/A",
        num_fewshot=None,
        documents=sum(one.documents for one in members),
        metrics={"acc_centered,none": sum(centred) / len(centred), "acc_centered_stderr,none": error},
        higher_is_better={"acc_centered": True},
        truncated=sum(one.truncated for one in members),
    )


def _entries(folder: Path) -> list[Entry]:
    file = folder / "core.yaml"
    try:
        tasks = strict_yaml.loads(file.read_text(encoding="utf-8-sig"))["icl_tasks"]
        entries = [_parsed(Entry, task, f"a task of {file}") for task in tasks]
    except OSError as error:
        raise ConfigError(
            f"{folder} holds no CORE tasks ({brief(error)}: core.yaml); name the folder of nanochat's eval bundle"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no list of icl_tasks ({brief(error)}); put the file of the bundle back") from error
    for entry in entries:
        if entry.icl_task_type not in KINDS:
            raise DataError(
                f"{file} has a task of type {entry.icl_task_type!r}: {did_you_mean(entry.icl_task_type, KINDS)}"
            )
    return entries


def _baselines(folder: Path) -> dict[str, float]:
    """The accuracy of chance of each task, from per cent."""
    file = folder / "eval_meta_data.csv"
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(lines)}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{file} gives no Random baseline by Eval Task ({type(error).__name__}: {brief(error)}); put the file of "
            "the bundle back"
        ) from error


def _parsed(kind: type[Any], value: Any, place: str) -> Any:
    try:
        return kind.model_validate_json(value) if isinstance(value, str) else kind.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        message = requirement(fault["msg"])
        where = ": ".join([place, *map(str, fault["loc"])])
        raise DataError(f"{where}: {message}; mend it") from error


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Counts the tokens with which all begin."""
    columns = zip(*sequences, strict=False)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), _shortest(sequences))


def _shortest(sequences: Sequence[Sequence[int]]) -> int:
    return min(map(len, sequences))
