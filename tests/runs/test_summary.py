"""What is found below a folder, and what is said of a run: how far it came, its losses, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cda_cli.config import resolve
from cda_cli.errors import ConfigError
from cda_cli.runs.folder import Run
from cda_cli.runs.records import CheckpointRecord, Record
from cda_cli.runs.summary import DEPTH, Summary, differing_settings, find_runs, summarise, summarise_all
from cda_cli.storage import only_writer, step_folder
from tests.runs.records import TRAIN, VALIDATION


def make_run(path: Path, records: Sequence[Record] = (), **flags: object) -> Path:
    run = Run(path)
    path.mkdir(parents=True)
    run.write_config(resolve("tiny", flags={key.replace("__", "."): value for key, value in flags.items()}))
    metrics = run.open_metrics(0)
    for record in records:
        metrics.write(record)
    metrics.close()
    return path


def validations(*losses: float) -> list[Record]:
    return [replace(VALIDATION, step=10 * place, loss=loss) for place, loss in enumerate(losses, 1)]


def saved(step: int) -> CheckpointRecord:
    return CheckpointRecord(step=step, path="x")


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    records = [*validations(3.0, math.nan, 2.0, 2.5), replace(TRAIN, step=44, loss=1.75)]
    run = summarise(make_run(tmp_path / "run", records, optim__steps=50))
    assert (run.state, run.step, run.steps) == ("interrupted", 44, 50)
    assert (run.best_loss, run.best_step, run.train_loss) == (2.0, 30, 1.75)
    assert repr(run.losses) == "[3.0, nan, 2.0, 2.5]"
    assert run.settings["optim.steps"] == 50


def test_a_run_without_records_has_no_losses(tmp_path: Path) -> None:
    run = summarise(make_run(tmp_path / "run"))
    assert (run.state, run.step, run.best_loss, run.best_step, run.train_loss) == ("interrupted", 0, None, None, None)
    assert run.losses == []


def test_the_curve_of_a_run_with_hardly_any_validations_is_its_training_loss(tmp_path: Path) -> None:
    training = [replace(TRAIN, step=step, loss=float(step)) for step in range(1, 2001)]
    run = summarise(make_run(tmp_path / "run", [*training, *validations(2.0, 1.0)]))
    assert (run.train_loss, run.best_loss) == (2000.0, 1.0)
    assert 50 <= len(run.losses) <= 100, "thousands of records make the table slow"
    assert run.losses == sorted(run.losses)
    assert run.losses[0] == 1.0


@pytest.mark.parametrize(
    ("records", "flags", "state"),
    [
        ([saved(40)], {}, "interrupted"),
        ([saved(40), replace(VALIDATION, step=50), saved(50)], {}, "finished"),
        ([saved(40), saved(50)], {}, "interrupted"),
        ([replace(TRAIN, step=50)], {}, "interrupted"),
        ([*validations(2.0, 2.1, 2.2), saved(30)], {"run__patience": 2}, "finished"),
        ([*validations(2.0, 2.1, 1.9), saved(30)], {"run__patience": 2}, "interrupted"),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_validated_and_saved_or_its_patience_is_over(
    tmp_path: Path, records: list[Record], flags: dict[str, object], state: str
) -> None:
    path = make_run(tmp_path / "run", records, optim__steps=50, **flags)
    assert summarise(path).state == state
    with only_writer(path, pytest.fail):
        assert summarise(path).state == "running"
    assert summarise(path).state == state


def test_a_checkpoint_counts_where_the_records_have_gone(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", optim__steps=50)
    step_folder(path, 50).mkdir(parents=True)
    assert (summarise(path).state, summarise(path).step) == ("finished", 50)


def found(folder: Path) -> list[str]:
    problems: dict[Path, str] = {}
    return [str(path.relative_to(folder)) for path in find_runs(folder, problems)]


def test_runs_are_found_in_folders_of_folders(tmp_path: Path) -> None:
    """But neither too deep, nor among the files that a tracker puts into a run, nor in hidden folders."""
    deep = "/".join("abcdefgh"[: DEPTH - 1])
    for name in ("one", "sweep/two", f"{deep}/three", f"{deep}/x/four", ".hidden/five"):
        make_run(tmp_path / name)
    files = tmp_path / "one" / "wandb" / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text("a: 1\n")
    assert sorted(found(tmp_path)) == [f"{deep}/three", "one", "sweep/two"]
    assert found(tmp_path / "one") == ["."]


def test_links_lead_to_runs_and_no_further(tmp_path: Path) -> None:
    """A run may lie on another disk; a link to a whole disk, or back to where it is, would take for ever."""
    make_run(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs" / "disk").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    assert found(tmp_path / "runs") == ["linked"]


def test_what_is_damaged_or_foreign_is_named_and_hides_no_run(tmp_path: Path) -> None:
    good = make_run(tmp_path / "a" / "good", validations(2.0))
    for name, text in {"foreign": "db: {host: x}\n", "damaged": "model: [", "wrong": "optim: {lr: -1}\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    make_run(tmp_path / "bare", validations(1.0))
    (tmp_path / "bare" / "config.yaml").unlink()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.yaml").symlink_to(good / "config.yaml")
    (tmp_path / "none of ours").mkdir()
    runs, problems = summarise_all([tmp_path])
    assert [run.path for run in runs] == [good]
    words = {"foreign": "unknown section 'db'", "damaged": "is not valid YAML", "wrong": "optim.lr = -1"}
    words |= {"bare": "there is no config.yaml in it", "linked": "is a link"}
    assert {path.name for path in problems} == set(words)
    for path, problem in problems.items():
        assert words[path.name] in problem
        assert "\n" not in problem


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", validations(3.0, 2.0))
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 30, "kind": "validation"}\n\xff\xfe\n[1]\n{"step": 40, "kind": "train", "loss": ')
    assert summarise(path).best_loss == 2.0


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Such as one that goes while the others are looked at."""
    problems: dict[Path, str] = {}
    assert list(find_runs(tmp_path / "gone", problems)) == []
    assert problems == {tmp_path / "gone": "it cannot be read (No such file or directory)"}


def test_a_starting_run_is_named(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new", pytest.fail):
        assert summarise_all([tmp_path]) == ([], {tmp_path / "new": "a run is starting here"})


def test_the_best_comes_first(tmp_path: Path) -> None:
    """Those without a validation come last, by their names; each run once, though two folders lead to it."""
    for name, losses in {"a": [3.0], "b": [], "c": [1.0, 9.0], "d": [], "e": [math.nan, 2.0]}.items():
        make_run(tmp_path / name, validations(*losses))
    runs, problems = summarise_all([tmp_path, tmp_path / "a"])
    assert ([run.path.name for run in runs], problems) == (["c", "e", "a", "b", "d"], {})


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; give one that holds runs"):
        summarise_all([tmp_path / "nowhere"])


def test_the_settings_that_differ_are_those_of_any_run(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", optim__lr=0.5),
        make_run(tmp_path / "c", model__attn_k=8.0, run__track="wandb"),
    ]
    runs: list[Summary] = [summarise(path) for path in paths]
    assert differing_settings(runs) == ["model.attn_k", "optim.lr", "run.track"]
    assert differing_settings(runs[:1]) == differing_settings([]) == []
