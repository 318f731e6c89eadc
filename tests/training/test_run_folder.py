"""The folder of a run: its figures, and what may go on in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cda_cli.config import Config, parse
from cda_cli.errors import ConfigError
from cda_cli.storage import LOCK
from cda_cli.training.run_folder import Metrics, check_folder, check_same_run, read_metrics


def written(path: Path, *steps: int) -> None:
    metrics = Metrics(path, 10**6)
    for step in steps:
        metrics.write({"step": step, "loss": step / 3})
    metrics.close()


def test_figures_come_back_as_they_were(tmp_path: Path) -> None:
    """To the last bit: a rounded loss could not show that a resumed run is the same."""
    written(tmp_path / "metrics.jsonl", 1, 2)
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}]


def test_a_text_with_any_line_end_comes_back(tmp_path: Path) -> None:
    """Python splits lines at ten characters, JSON lines end at one: records would vanish at the next resume."""
    text = "a\u2028b\u2029c\x85d\x0ce\x0bf\rg\r\nh\x1ci\n"
    for step in (1, 2):
        metrics = Metrics(tmp_path / "metrics.jsonl", step)
        metrics.write({"step": step, "text": text})
        metrics.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": step, "text": text} for step in (1, 2)]


def test_a_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """Whoever follows the file, or kills the run, must find what was printed."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    metrics.close()


def test_lines_of_steps_to_come_are_dropped(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl", 1, 2, 3, 4)
    metrics = Metrics(tmp_path / "metrics.jsonl", 2)
    metrics.write({"step": 3, "loss": 0.0})
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    "rest",
    [
        b'{"step": 3, "lo', b"\0\0\0", b"[1, 2]\n", b"3\n", b"\n", b'{"loss": 1}\n', b"\xff\xfe\n",
        b'{"step": "3"}\n', b"[" * 100_000 + b"\n",
    ],
    ids=range(9),
)  # fmt: skip
def test_what_a_kill_or_a_bad_disk_left_behind_is_passed_over(tmp_path: Path, rest: bytes) -> None:
    """A run must not refuse to go on because a line of figures is cut short or damaged."""
    file = tmp_path / "metrics.jsonl"
    written(file, 1, 2)
    file.write_bytes(file.read_bytes() + rest)
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
    written(file, 3)
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]


def test_what_a_kill_leaves_before_there_is_a_configuration_is_no_other_folder(tmp_path: Path) -> None:
    """The same command must start again, and not ask for another folder."""
    (tmp_path / LOCK).touch()
    (tmp_path / ".tmp-config.yaml-123-0123abcd").touch()
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        check_folder(tmp_path)


def test_no_figures_yet(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"dim": 256}), ("model", {"attn_eps": 0.3}), ("model", {"solver": "iterative"}),
        ("data", {"source": "other"}), ("data", {"tokenizer": "other.json"}), ("run", {"seed": 3}),
    ],
)  # fmt: skip
def test_what_makes_another_run(section: str, changes: dict[str, object]) -> None:
    """The key and both values are named, so that a person sees which is meant."""
    [(key, value)] = changes.items()
    before, now = Config(), parse({section: changes})
    with pytest.raises(ConfigError, match=rf"{section}\.{key} is .* there and {value!r} here.*another --out"):
        check_same_run(before, now, Path("run"))


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("optim", {"steps": 5, "lr": 1.0, "batch_size": 3, "weight_decay": 0.0, "schedule": "constant"}),
        ("run", {"save_every": 1, "log_every": 3, "device": "cpu", "dtype": "float32", "keep": 5}),
    ],
)
def test_what_may_change(section: str, changes: dict[str, object]) -> None:
    check_same_run(Config(), parse({section: changes}), Path("run"))
