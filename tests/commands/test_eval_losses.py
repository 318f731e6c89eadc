"""`cda eval --losses`: a line for each document or window, from which an evaluation goes on to the same bits."""

from __future__ import annotations

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cda_cli.errors import InterruptedRunError
from cda_cli.evaluation import LossesFile, Plan, evaluate_readings, open_readings
from cda_cli.restore import open_side, restore_on
from cda_cli.signals import StopRequest
from tests.commands.helpers import Cda, assert_refused, contents

DOCUMENTS = [f"Document {number}: " + "a fine text. " * (number % 7) for number in range(12)]
BY_DOCUMENT = ("--per-document", "--stride", 11, "--batch-size", 5)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS), encoding="utf-8")
    return path


def evaluated(cda: Cda, *arguments: object) -> dict[str, Any]:
    result = cda("eval", *arguments, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert isinstance(document, dict)
    return document


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_document_has_a_line(cda: Cda, finished: Path, documents: Path, tmp_path: Path) -> None:
    """Their sums are the figures, and what is written changes none of them."""
    arguments = (finished, "--data", documents, *BY_DOCUMENT)
    found = evaluated(cda, *arguments, "--losses", tmp_path / "losses.jsonl")
    assert found == evaluated(cda, *arguments)
    settings, *lines = lines_of(tmp_path / "losses.jsonl")
    assert (settings["checkpoint"], settings["stride"]) == (found["checkpoint"], 11)
    assert [line["document"] for line in lines] == list(range(len(DOCUMENTS)))
    for line, document in zip(lines, DOCUMENTS, strict=True):
        assert line["tokens"] == line["text_bytes"] == len(document)
        assert line["words"] == len(document.split())
        assert line["loss"] == pytest.approx(math.fsum(line["nats"]) / len(document))
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
    assert math.fsum(nats for line in lines for nats in line["nats"]) / found["tokens"] == pytest.approx(found["loss"])


@pytest.mark.parametrize(
    "options",
    [
        (*BY_DOCUMENT, "--by-position", "--calibration"),
        ("--cut", "top:2", "--cut", "recent:3:drop", "--by-position", "--batch-size", 7),
    ],
    ids=["documents", "windows"],
)
def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_bits(
    cda: Cda, finished: Path, documents: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    """Wherever it was cut: between lines, within one, before the second checkpoint, within the first line."""
    arguments = (finished, finished / "checkpoints" / "step-00000004", "--data", documents, *options)
    path = tmp_path / "losses.jsonl"
    found, whole = evaluated(cda, *arguments, "--losses", path), path.read_bytes()
    second = whole.rindex(b'{"checkpoint"')
    for cut in (0, 10, second // 2, second - 1, second, second + 40, (second + len(whole)) // 2, len(whole)):
        path.write_bytes(whole[:cut])
        assert evaluated(cda, *arguments, "--losses", path) == found, f"cut at {cut}"
        assert path.read_bytes() == whole, f"cut at {cut}"


def test_causal_checks_that_were_cut_off_go_on_to_the_same_bits(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Also those that take a pass over the whole text before, for means of heads, gradients and rows."""
    path = tmp_path / "losses.jsonl"
    checks = ("--cut", "units:4", "--as", "gate", "--as", "k*1.01", "--ablate", "heads", "--ablate", "heads:gradient")
    arguments = (finished, "--max-batches", 2, "--batch-size", 4, *checks, "--losses", path)
    found, whole = evaluated(cda, *arguments), path.read_bytes()
    path.write_bytes(whole[: 2 * len(whole) // 3])
    assert evaluated(cda, *arguments) == found
    assert path.read_bytes() == whole


def test_an_interrupt_keeps_what_was_done(cda: Cda, finished: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "losses.jsonl", {"data": None, "split": None, "show_progress": False}
    with StopRequest() as stop, LossesFile.open(path) as file:
        plan = Plan(batch_size=4)
        readings = open_readings([finished], plan, partial(open_side, stop=stop, **options))
        restore = partial(restore_on, device="cpu", dtype="auto", backend="auto")

        def interrupt(windows: int) -> None:
            if windows:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(InterruptedRunError, match=r"the same command goes on from .*losses\.jsonl"):
            evaluate_readings(plan, readings, restore, stop, interrupt, file)
    assert len(lines_of(path)) == 1 + 4
    found = evaluated(cda, finished, "--batch-size", 4, "--losses", path)
    assert found == evaluated(cda, finished, "--batch-size", 4)


def test_a_further_checkpoint_is_added(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """What was measured is not measured again, so a changed line shows in the figures."""
    path, older = tmp_path / "losses.jsonl", finished / "checkpoints" / "step-00000004"
    evaluated(cda, finished, "--losses", path)
    first, line, *others = path.read_text(encoding="utf-8").splitlines()
    values = json.loads(line)
    values["nats"] = [values["nats"][0] + 1200]
    path.write_text("\n".join([first, json.dumps(values), *others, ""]), encoding="utf-8")
    found, plain = (evaluated(cda, finished, older, *more)["checkpoints"] for more in ((("--losses", path)), ()))
    assert found[0]["loss"] - plain[0]["loss"] == pytest.approx(1200 / plain[0]["tokens"])
    assert found[1]["loss"] == plain[1]["loss"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--context", "16"], "with context 32 in place of 16"),
        (["--stride", "5"], "with stride 32 in place of 5"),
        (["--dtype", "bfloat16"], "with dtype float32 in place of bfloat16"),
        (["--per-document"], "with per_document False"),
        (["--cut", "top:3"], "with interventions none in place of top[3]"),
        (["--split", "train"], "with text "),
        (["--max-batches", "1"], "with windows "),
        (["--calibration"], "with calibration False"),
    ],
)
def test_losses_of_another_evaluation_are_refused(
    cda: Cda, finished: Path, tmp_path: Path, changes: list[str], words: str
) -> None:
    path = tmp_path / "losses.jsonl"
    evaluated(cda, finished, "--losses", path)
    before = contents(tmp_path)
    refused = cda("eval", finished, *changes, "--losses", path)
    assert_refused(refused, "has the losses of another evaluation", words, "give --losses another file")
    assert contents(tmp_path) == before


def test_losses_are_written_to_an_ordinary_file_only(cda: Cda, finished: Path) -> None:
    refused = cda("eval", finished, "--losses", "/dev/null")
    assert_refused(refused, "/dev/null is no ordinary file; give --losses the name of one")


def test_losses_of_another_checkpoint_are_refused(cda: Cda, finished: Path, tmp_path: Path) -> None:
    evaluated(cda, finished, "--losses", tmp_path / "losses.jsonl")
    older = finished / "checkpoints" / "step-00000004"
    assert_refused(cda("eval", older, "--losses", tmp_path / "losses.jsonl"), "of another evaluation, with weights ")


@pytest.mark.parametrize("content", ["a note\n", "a note", '{"tokens": 3}\n', "[]\n", "1\n{}\n"])
def test_a_file_of_something_else_is_left_alone(cda: Cda, finished: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes"
    path.write_text(content, encoding="utf-8")
    assert_refused(cda("eval", finished, "--losses", path), "line 1", "is no line of --losses")
    assert path.read_text(encoding="utf-8") == content
    assert_refused(cda("eval", finished, "--losses", tmp_path), "cannot be opened", "give --losses a file")
    assert_refused(cda("eval", finished, "--losses", tmp_path / "no" / "file"), "cannot be opened")


def test_lines_that_are_damaged_are_refused(cda: Cda, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    evaluated(cda, finished, "--losses", path)
    first, line, *others = path.read_text(encoding="utf-8").splitlines()
    for changed in (line.replace('"nats"', '"bats"'), line.replace('"nats": [', '"nats": [1.0, ')):
        path.write_text("\n".join([first, changed, *others, ""]), encoding="utf-8")
        assert_refused(cda("eval", finished, "--losses", path), "is damaged")
