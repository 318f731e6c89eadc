"""The results of tasks on the disk: each is written as its task ends, and is not computed again.

FOLDER/TASK-KEY.json   KEY is a hash of all that decides the result: the weights, the task and its data, the settings
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cda_cli import strict_json
from cda_cli.evaluation.tasks.base import Scorer, Selection, TaskResult
from cda_cli.plurals import counted
from cda_cli.restore import Restored
from cda_cli.signals import StopRequest
from cda_cli.storage import CHECKPOINTS, STATE_FILE, recorded_sha256, write_file

RESULTS = "evaluations"


class TaskResults(NamedTuple):
    """What a checkpoint scored, by task, and the folder that has it. `averaged` is that of `Restored`."""

    checkpoint: Path
    averaged: bool
    folder: Path
    results: dict[str, TaskResult]

    def as_dict(self) -> dict[str, Any]:
        tasks = {name: vars(result) for name, result in self.results.items()}
        return {"checkpoint": str(self.checkpoint), "results": str(self.folder), "tasks": tasks}


def results_folder(restored: Restored) -> Path:
    """Returns where the results of a checkpoint are: in the folder of its run, or beside a checkpoint without one."""
    parent = restored.path.parent
    return (parent.parent if parent.name == CHECKPOINTS else parent) / RESULTS


def evaluate_tasks(
    selection: Selection,
    scorer: Scorer,
    folder: Path,
    stop: StopRequest,
    note: Callable[[str], object] = lambda sentence: None,
) -> dict[str, TaskResult]:
    """Scores a model in all tasks of `selection`, and returns results and summaries by name.

    What `folder` has is read, and each other result is written as its task ends; `note` gets a sentence on what was
    read. Raises InterruptedRunError when a stop is asked for. The tasks that have ended are then in the folder.
    """
    model = _model_identity(scorer)
    results: dict[str, TaskResult] = {}
    read = 0
    for name, task in selection.tasks.items():
        done = f"{len(results)} of {counted(len(selection.tasks), 'task')}"
        with stop.at_once(
            f"interrupted; the results of {done} are in {folder}, and the same command goes on from there"
        ):
            identity = {"model": model, "task": name, **task.identity()}
            file = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{_key(identity)}.json"
            known = _read(file, identity)
            result = known or _as_written(task.run(scorer))
        if known is None:
            document = {"identity": identity, "result": asdict(result)}
            write_file(file, (strict_json.dumps(document, indent=2) + "\n").encode())
        read += known is not None
        results[name] = result
    if read:
        note(f"{counted(read, 'result')} of an earlier evaluation came from {folder}")
    return results | {name: summarise(results) for name, summarise in selection.summaries.items()}


def _model_identity(scorer: Scorer) -> dict[str, Any]:
    """What decides the scores of a model: its files, and the dtype of its matrix products.

    Batch size, device and backend change no more than the last digits of a log-probability.
    """
    restored = scorer.restored
    files = recorded_sha256(restored.path)
    names = (restored.weights_file, STATE_FILE, "tokenizer.json")
    return {
        "files": {name: files[name] for name in names if name in files},
        "dtype": str(scorer.dtype).removeprefix("torch."),
    }


def _key(identity: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _read(file: Path, identity: dict[str, Any]) -> TaskResult | None:
    """Returns the result in a file, or None where there is none of this identity that can be read."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return TaskResult(**document["result"]) if document["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_written(result: TaskResult) -> TaskResult:
    """Returns the result as it will be read, in which a number that is not finite is None."""
    return TaskResult(**json.loads(strict_json.dumps(asdict(result))))
