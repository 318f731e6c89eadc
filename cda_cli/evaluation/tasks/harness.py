"""Tasks of EleutherAI's lm-evaluation-harness: names → tasks with their data, and what they score.

Its tasks are used as they are, and each is evaluated by itself, with the seeds of its `simple_evaluate`. lm_eval is the
extra `eval`; only these functions import it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cda_cli.data.hub import offline_where_unreachable, quiet_libraries, read_errors
from cda_cli.errors import ConfigError, DataError, brief, did_you_mean
from cda_cli.evaluation.tasks.base import EvaluationTask, Scorer, Selection, TaskOptions, TaskResult
from cda_cli.storage import sha256_of

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BOOTSTRAP_SAMPLES = 100_000  # for the standard error of a metric that is no mean, as in lm_eval


class Listed(NamedTuple):
    """A name that `--tasks` takes: of a task, of a group, or of a tag, which stands for several tasks.

    `output_type` is how a task asks a model, where its YAML says so, and `source` the YAML.
    """

    name: str
    kind: str
    output_type: str | None
    source: str | None


def list_harness_tasks(include: Path | None) -> list[Listed]:
    """Lists all that lm_eval brings and that the YAML files below `include` add, by name. Loads no data."""
    manager = _manager(include)
    kinds = dict.fromkeys(manager.all_groups, "group") | dict.fromkeys(manager.all_tags, "tag")
    return [
        Listed(name, kinds.get(name, "task"), (entry.cfg or {}).get("output_type"), str(entry.yaml_path or "") or None)
        for name, entry in sorted(manager.task_index.items())
    ]


def find_harness_tasks(names: Sequence[str], options: TaskOptions) -> Selection:
    """Loads tasks with their data, which lm_eval downloads where a task names data that is not here.

    A name may be that of a group or a tag, a pattern such as arc_*, or the path of a YAML file.

    Raises ConfigError for a name that is unknown, and DataError for a task that cannot be loaded.
    """
    manager = _manager(options.include, names)
    selection = Selection()
    matched = [match for name in names for match in _matches(manager, name)]
    with _quiet(), offline_where_unreachable():
        for name in dict.fromkeys(matched):
            # datasets raises a RuntimeError for data that only a script of its own could load.
            with _task_errors(name, "loaded", RuntimeError):
                loaded = manager.load([name])
            for task_name, task in loaded["tasks"].items():
                found = HarnessTask(task_name, task, options.num_fewshot, options.limit)
                selection.tasks.setdefault(task_name, found)
            for group_name, group in loaded["groups"].items():
                if group.has_aggregation:
                    selection.summaries[group_name] = partial(_summarise, group)
    return selection


class HarnessTask(EvaluationTask):
    """A task of lm_eval with its data."""

    def __init__(self, name: str, task: Any, num_fewshot: int | None, limit: int | None) -> None:
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        self.name, self._task, self._limit = name, task, limit
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)

    def identity(self) -> dict[str, Any]:
        import lm_eval

        with _quiet(), _task_errors(self.name, "read"):
            few = self._task.fewshot_docs() if self._task.get_config("num_fewshot") else ()
            documents = itertools.islice(self._task.eval_docs, self._limit)
            return {
                "kind": "lm_eval",
                "lm_eval": lm_eval.__version__,
                "config": _digest([self._task.dump_config()]),
                "documents": _digest(documents),
                "few_shot": _digest(few or ()),
                "limit": self._limit,
            }

    def run(self, scorer: Scorer) -> TaskResult:
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate

        from cda_cli.evaluation.tasks.harness_model import HarnessModel

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        model = HarnessModel(scorer, self.name)
        with _quiet(), _task_errors(self.name, "evaluated"):
            found: Mapping[str, Any] = evaluate(
                model,
                {"tasks": {self.name: self._task}, "groups": {}},
                limit=self._limit,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
                log_samples=False,
            )
        return TaskResult(
            task=self.name,
            version=str(found["versions"][self.name]),
            num_fewshot=found["n-shot"][self.name],
            documents=found["n-samples"][self.name]["effective"],
            metrics=_metrics(found["results"][self.name]),
            higher_is_better=found["higher_is_better"].get(self.name, {}),
            truncated=model.truncated,
        )


def _summarise(group: Any, results: Mapping[str, TaskResult]) -> TaskResult:
    """Aggregates the tasks of a group as its YAML says."""
    members = [results[task.task_name] for task in group.get_all_tasks()]
    with _quiet():
        found = group.aggregate({member.task: _as_found(member) for member in members})
    shots = {member.num_fewshot for member in members}
    return TaskResult(
        task=group.name,
        version=group.version,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        documents=found["sample_len"],
        metrics=_metrics(found),
        higher_is_better=members[0].higher_is_better,
        truncated=sum(member.truncated for member in members),
    )


def _as_found(result: TaskResult) -> dict[str, Any]:
    """Gives a result back to lm_eval, which writes "N/A" where there is no standard error."""
    metrics = {key: "N/A" if value is None else value for key, value in result.metrics.items()}
    return {"sample_len": result.documents, **metrics}


def _metrics(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Keeps what is a metric of what lm_eval has found: "METRIC,FILTER"."""
    metrics = {key: math.nan if isinstance(value, str) else float(value) for key, value in found.items() if "," in key}
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


def _manager(include: Path | None, names: Sequence[str] = ()) -> TaskManager:
    """Indexes the YAML files of `include`, and those that lm_eval brings, unless `names` are all of `include`.

    There are thousands of the latter, which take seconds.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness ({brief(error)}); install it with pip install 'cda-cli[eval]'"
        ) from error
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include {include} is no folder; name the folder of the YAML files of your tasks")
    with _quiet():
        if include is not None and names:
            own = TaskManager(include_path=str(include), include_defaults=False)
            members = {group: own.task_index[group].cfg["task"] for group in own.all_groups}
            if all(member in own.all_subtasks for name in names for member in members.get(name, [name])):
                return own
        return TaskManager(include_path=include and str(include))


def _matches(manager: TaskManager, name: str) -> list[str]:
    if name in manager.task_index or Path(name).is_file():
        return [name]
    if "*" in name and (matches := manager.match_tasks([name])):
        return list(matches)
    nearest = did_you_mean(name, manager.all_tasks, "`cda eval --tasks list` lists them")
    raise ConfigError(f"there is no task {name!r}: {nearest}")


def _digest(values: Iterable[Any]) -> str:
    """Digests plain values, and functions by the files that they are from."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=_described).encode())
    return digest.hexdigest()


def _described(value: Any) -> Any:
    code = getattr(value, "__code__", None)
    source = Path(code.co_filename) if code else None
    return [str(getattr(value, "__qualname__", value)), sha256_of(source) if source and source.is_file() else None]


@contextlib.contextmanager
def _task_errors(name: str, verb: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what the YAML, the Python and the data of a task may raise into a sentence.

    They are the user's, and lm_eval checks little of them.
    """
    import jinja2
    import yaml

    errors: tuple[type[BaseException], ...] = (*read_errors(), jinja2.TemplateError, yaml.YAMLError, *also)
    errors += (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)
    try:
        yield
    except ConnectionError as error:
        raise DataError(
            f"the data of the task {name} is not here, and its source cannot be reached ({brief(error)}); connect to "
            "the network, or name a task with local data"
        ) from error
    except errors as error:
        raise DataError(
            f"the task {name} cannot be {verb} ({type(error).__name__}: {brief(error)}); check its YAML and its data, "
            "or see the traceback with `cda --debug eval`"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what lm_eval and its libraries print and log: stdout is ours, and so is the progress."""
    sink = io.StringIO()
    with quiet_libraries(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
