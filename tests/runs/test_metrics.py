"""metrics.jsonl: records are on the disk at once, and a run that goes on keeps all that it does not do again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cda_cli.runs.metrics import Metrics, NullMetrics, read_kind, read_metrics
from cda_cli.runs.records import VERSION, Record, SampleRecord, SchemaRecord, TrainRecord
from tests.runs.records import ONE_OF_EACH, TRAIN

SCHEMA = {"step": 0, "kind": "schema", "version": VERSION}


def write(path: Path, *records: Record, resumed_step: int = 0) -> None:
    metrics = Metrics(path, resumed_step)
    for record in records:
        metrics.write(record)
    metrics.close()


def at(*steps: int) -> list[Record]:
    return [dataclasses.replace(TRAIN, step=step, loss=step / 3) for step in steps]


def without_schema(path: Path) -> list[Record]:
    return [record for record in read_metrics(path) if not isinstance(record, SchemaRecord)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_records_come_back_as_they_were(file: Path) -> None:
    write(file, *ONE_OF_EACH[1:])
    assert list(read_metrics(file)) == [SchemaRecord(step=0, version=VERSION), *ONE_OF_EACH[1:]]


def test_the_records_of_one_kind_come_alone(file: Path) -> None:
    """From a sample that speaks of another kind, and from either end."""
    write(file, *at(1, 2, 3), SampleRecord(step=3, text='{"kind": "train"}'), SampleRecord(step=4, text="x"))
    assert [record.step for record in read_kind(file, TrainRecord)] == [1, 2, 3]
    assert [record.step for record in read_kind(file, TrainRecord, newest_first=True)] == [3, 2, 1]
    assert [record.step for record in read_kind(file, SampleRecord)] == [3, 4]


def test_records_of_one_kind_are_thinned_out_evenly(file: Path) -> None:
    write(file, *at(*range(100)))
    assert [record.step for record in read_kind(file, TrainRecord, most=30)] == list(range(0, 100, 4))
    assert len(list(read_kind(file, TrainRecord, most=100))) == 100


def test_a_file_says_which_schema_its_lines_follow(file: Path) -> None:
    """Once: a run that goes on with the same version adds no line."""
    write(file, *at(1))
    write(file, *at(2), resumed_step=1)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert lines[0] == SCHEMA
    assert [line["kind"] for line in lines] == ["schema", "train", "train"]


def test_a_file_without_a_schema_is_read_and_gone_on_with(file: Path) -> None:
    """It is of a version before there was a schema. Its lines stay as they are; a schema comes before the new ones."""
    write(file, *at(1, 2, 3))
    lines = file.read_bytes().splitlines(keepends=True)[1:]
    file.write_bytes(b"".join(lines))
    assert list(read_metrics(file)) == at(1, 2, 3)
    write(file, *at(3), resumed_step=2)
    assert file.read_bytes().startswith(lines[0] + lines[1])
    assert list(read_metrics(file)) == [*at(1, 2), SchemaRecord(step=2, version=VERSION), *at(3)]


def test_what_a_later_version_wrote_is_kept(file: Path) -> None:
    """An older `cda` that goes on with the run cannot read it, and must not lose it."""
    later = [SCHEMA | {"version": VERSION + 1}, {"step": 1, "kind": "probe", "heat": 3.5, "of": [{"deep": None}]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in later))
    write(file, *at(2), resumed_step=1)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert lines[:3] == [*later, SCHEMA | {"step": 1}]
    assert without_schema(file) == at(2)


def test_a_text_with_any_line_end_comes_back(file: Path) -> None:
    """Python splits lines at ten characters, JSON lines end at one: records would vanish at the next resume."""
    text = "a\u2028b\u2029c\x85d\x0ce\x0bf\rg\r\nh\x1ci\n"
    samples = [SampleRecord(step=step, text=text) for step in (1, 2)]
    for sample in samples:
        write(file, sample, resumed_step=sample.step)
    assert without_schema(file) == samples


def test_a_record_is_on_the_disk_at_once(file: Path) -> None:
    """Whoever follows the file, or kills the run, must find what was printed."""
    metrics = Metrics(file, 0)
    metrics.write(SampleRecord(step=1, text="abc"))
    assert file.read_text().splitlines()[1:] == ['{"step": 1, "kind": "sample", "text": "abc"}']
    metrics.close()


def test_lines_of_steps_to_come_are_dropped(file: Path) -> None:
    write(file, *at(1, 2, 3, 4))
    write(file, *at(3), resumed_step=2)
    assert without_schema(file) == at(1, 2, 3)


@pytest.mark.parametrize(
    "rest",
    [
        b'{"step": 3, "lo', b"\0\0\0", b"[1, 2]\n", b"3\n", b"\n", b'{"loss": 1}\n', b"\xff\xfe\n",
        b'{"step": "3"}\n', b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 5_000 + b"}\n",
    ],
    ids=range(10),
)  # fmt: skip
def test_what_a_kill_or_a_bad_disk_left_behind_is_passed_over(file: Path, rest: bytes) -> None:
    """A run must not refuse to go on because a line is cut short or damaged."""
    write(file, *at(1, 2))
    file.write_bytes(file.read_bytes() + rest)
    assert without_schema(file) == at(1, 2)
    write(file, *at(3), resumed_step=2)
    assert without_schema(file) == at(1, 2, 3)


@pytest.mark.parametrize("kind", ["missing", "link", "folder"])
def test_there_is_no_file_yet(file: Path, tmp_path: Path, kind: str) -> None:
    """A run may come from anywhere, and a link would lead out of it."""
    if kind == "link":
        write(tmp_path / "elsewhere", *at(1))
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        file.mkdir()
    assert list(read_metrics(file)) == []


def test_a_process_that_does_not_write_leaves_no_file(tmp_path: Path) -> None:
    metrics = NullMetrics()
    metrics.write(TRAIN)
    metrics.close()
    assert not list(tmp_path.iterdir())
