"""The best checkpoint by validation loss: which it is, and that pruning leaves it."""

import errno
import os
from pathlib import Path

import pytest

from cda_cli.storage.checkpoint import best, list_steps, publish, step_folder


def judged(contents, step: int, loss: float | None) -> dict[str, object]:
    made = contents(step)
    return made | {"state": made["state"] | {"validation_loss": loss}}


def test_the_best_stays_besides_the_newest(tmp_path: Path, contents) -> None:
    """Its own step may lie far behind; whoever is no longer the best goes as any other."""
    losses = {10: 3.0, 20: 2.0, 30: None, 40: 2.5, 50: 2.75, 60: 1.5, 70: 1.5, 80: None, 90: 9.0}
    left = []
    for step, loss in losses.items():
        publish(tmp_path, **judged(contents, step, loss), keep_best=True)
        left.append(list_steps(tmp_path))
    assert left[2:6] == [[20, 30], [20, 30, 40], [20, 40, 50], [50, 60]]
    assert left[-1] == [70, 80, 90], "of two equals the newer is the best"
    assert best(tmp_path) == step_folder(tmp_path, 70)
    publish(tmp_path, **judged(contents, 100, None))
    assert list_steps(tmp_path) == [90, 100], "nobody asked to keep the best"


def test_a_damaged_best_is_no_reason_to_lose_a_whole_one(tmp_path: Path, contents) -> None:
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        publish(tmp_path, **judged(contents, step, loss), keep=9)
    (step_folder(tmp_path, 1) / "optimizer.safetensors").write_bytes(b"")
    assert best(tmp_path) == step_folder(tmp_path, 2)
    for step in (4, 5):
        publish(tmp_path, **judged(contents, step, None), keep_best=True)
    assert list_steps(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "model.safetensors"])
def test_a_best_that_the_disk_does_not_give_stays(tmp_path: Path, contents, watch, name: str) -> None:
    """The next time it may: then the one that stayed in its place goes."""
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        publish(tmp_path, **judged(contents, step, loss), keep=9)
    failing = str(step_folder(tmp_path, 1) / name)

    def fail(event: str, path: str) -> None:
        if event == "open" and path == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with watch(fail):
        assert best(tmp_path) == step_folder(tmp_path, 2)
        for step in (4, 5):
            publish(tmp_path, **judged(contents, step, None), keep_best=True)
    assert list_steps(tmp_path) == [1, 2, 4, 5]
    publish(tmp_path, **judged(contents, 6, None), keep_best=True)
    assert list_steps(tmp_path) == [1, 5, 6]


def test_without_a_validation_there_is_no_best(tmp_path: Path, contents) -> None:
    publish(tmp_path, **judged(contents, 1, None))
    assert best(tmp_path) is None
