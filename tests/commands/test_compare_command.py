"""`cda compare`: runs side by side, from their records and from their models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cda_cli.config import parse
from cda_cli.model import Transformer, state_tensors
from cda_cli.runs.folder import Run
from cda_cli.storage import load, publish
from tests.commands.helpers import Cda, assert_refused
from tests.comparison.runs import write_run

TEXT = {"tokenizer": "bytes", "content": ["a", "b"]}


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two runs that have records, and checkpoints without weights."""
    write_run(tmp_path / "plain", [8.0, 6.0, 5.0, 4.5], flags={"model.attention": "softmax"}, text=TEXT)
    write_run(tmp_path / "sparse", [8.0, 5.5, 4.5, 4.0], tokens_per_second=500.0, text=TEXT)
    monkeypatch.chdir(tmp_path)
    return "plain", "sparse"


@pytest.fixture(scope="session")
def other(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with another seed, and as its weights the same with the embedding twice as large."""
    path = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns("checkpoints"))
    [newest] = Run(finished).checkpoints()[-1:]
    saved = load(newest)
    weights = {name: each * 2 if "embedding" in name else each for name, each in saved.model.items()}
    assert any("embedding" in name for name in weights)
    saved.state["config"]["run"]["seed"] = 1
    Run(path).write_config(parse(saved.state["config"]))
    publish(path, step=saved.state["step"], model=weights, optimizer={}, rng={}, state=saved.state)
    return path


def test_records_alone_say_most_of_it(cda: Cda, recorded: tuple[str, str]) -> None:
    done = cda("compare", *recorded, "--no-eval")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for line in (
        "A plain, finished at step 40",
        "No model was evaluated: --no-eval leaves them out.",
        "After 4,000 tokens of training each, the validation loss is A 4.5000, B 4.0000 bits per byte.",
        "After 4.0 s of training each, the validation loss is A 4.5000, B 5.5000 bits per byte.",
        "B trains 0.50 times as fast as A, with 1.00 times its memory.",
        "model.attention softmax coordinate-descent",
        "tokens A B",
        "1 k 8.0000 8.0000",
    ):
        assert line in lines, f"{line!r} is not in:\n{done.out}"
    assert max(map(len, done.out.splitlines())) <= 100


def test_feed_forwards_that_differ_have_their_units_and_blocks(cda: Cda, recorded: tuple[str, str]) -> None:
    title = "Feed-forward in the newest train records, means over layers"
    assert title not in cda("compare", *recorded, "--no-eval").out
    write_run(Path("routed"), flags={"model.ff": "blocks"}, active_blocks=4.5, text=TEXT)
    lines = [" ".join(line.split()) for line in cda("compare", "plain", "routed", "--no-eval").out.splitlines()]
    assert lines[lines.index(title) :][1:4] == ["A B", "active units 75.0% 75.0%", "blocks of a token – 4.50"]


def test_a_verdict_on_unequal_training_says_so(cda: Cda, finished: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    shutil.copytree(finished, shorter)
    lines = (shorter / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if json.loads(line).get("kind") == "train")
    (shorter / "metrics.jsonl").write_text("".join(lines[:last] + lines[last + 1 :]))
    words = "They trained on unequal numbers of tokens"
    assert words in cda("compare", finished, shorter, "--max-batches", 1).out
    assert words not in cda("compare", finished, shorter, "--no-eval").out, "no model is called better there"


def test_json_has_the_same_without_the_models(cda: Cda, recorded: tuple[str, str]) -> None:
    document = json.loads(cda("compare", *recorded, "--no-eval", "--json").out)
    assert [run["name"] for run in document["runs"]] == ["A", "B"]
    assert document["settings"] == {"model.attention": ["softmax", "coordinate-descent"]}
    assert document["losses"]["equal_seconds"][-1]["bits_per_byte"] == [4.5, 5.5]
    assert document["losses"]["curves"][1]["bits_per_byte"] == [8.0, 5.5, 4.5, 4.0]
    assert {fact["name"]: fact["is_same"] for fact in document["comparable"]}["data"] is True
    assert "evaluation" not in document


def test_models_are_compared_as_cda_eval_compares_them(cda: Cda, finished: Path, other: Path) -> None:
    done = cda("compare", finished, other, "--json", "--cut", "top:1,2", "--fail-if", "A.tokens < 0")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    evaluated = json.loads(cda("eval", finished, other, "--json", "--cut", "top:1,2").out)
    assert document["evaluation"] == evaluated
    [_, second] = evaluated["checkpoints"]
    half = max(abs(end - second["difference"]) for end in second["difference_interval"])
    better = "better" if second["difference"] < 0 else "worse"
    told = f"B is {abs(second['difference']):.4f} ± {half:.4f} bits per byte {better} than A"
    assert told in document["verdict"][0]
    assert "more than 1 in 20 such intervals would miss. They differ in the seed alone" in document["verdict"][0]
    assert evaluated["resampled"]["number"] < 30
    of_many = cda("compare", finished, other, "--json", "--context", 2)
    assert of_many.err == ""
    long = cda("compare", finished, other, "--json", "--context", 160, "--max-batches", 1)
    assert "windows of 160 tokens, 5 times as many as in training" in long.err
    assert json.loads(of_many.out)["evaluation"]["resampled"]["number"] >= 30
    assert "better than A; 1 in 20 such" in of_many.out or "worse than A; 1 in 20 such" in of_many.out
    assert document["seed_groups"] == [["A", "B"]]
    assert document["head_overlap"][0]["any_two"] < 1
    assert len(document["attention"][0]["layers"]) == 2
    assert document["not_evaluated"] is None


def test_runs_that_are_alike_are_not_told_apart(cda: Cda, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    done = cda("compare", finished, copy, "--max-batches", 1)
    assert "B and A are not told apart: B is 0.0000 ± 0.0000 bits per byte" in done.out
    assert "All settings are the same." in done.out


def test_a_check_without_meaning_for_one_run_is_left_out_of_it(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """A softmax has no budget, so its rows are no gate times a softmax; the run with a budget is still measured."""
    plain, state = tmp_path / "plain", load(Run(finished).checkpoints()[-1], parts=()).state
    state["config"]["model"] |= {"attention": "softmax", "learned_k": False}
    config = parse(state["config"])
    Run(plain).path.mkdir()
    Run(plain).write_config(config)
    model = state_tensors(Transformer(config.model))
    publish(plain, step=state["step"], model=model, optimizer={}, rng={}, state=state)
    done = cda("compare", plain, finished, "--max-batches", 1, "--as", "gate")
    assert done.code == 0, done.err
    [line] = [line for line in done.out.splitlines() if line.startswith("k·softmax(s/ε)")]
    assert line.split()[1] == "–"
    assert "±" in line
    assert re.search(r"gate-equivalent rows: B [\d.]+%", done.out)


def test_the_page_stands_alone(cda: Cda, finished: Path, other: Path, tmp_path: Path) -> None:
    """One file that asks for nothing: no script, no address, and every figure that the terminal shows."""
    page = tmp_path / "page.html"
    done = cda("compare", finished, other, "--max-batches", 1, "--cut", "top:1..4", "--html", page)
    assert done.code == 0, done.err
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert not re.search(r"(src|href|url)\s*=?\(?\s*[\"']?(https?:|//|data:)", html)
    assert "light-dark(" in html
    root = ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))
    words = " ".join(" ".join(root.itertext()).split())
    for sentence in done.out.split("\n\n")[1].splitlines():
        assert sentence in words
    for cell in (each.text or "" for each in root.iter("td")):
        assert cell in " ".join(done.out.split()), f"{cell!r} is not in the terminal"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}svg")) or list(root.iter("svg"))) == 3


@pytest.mark.parametrize("missing", ["checkpoints", "text"])
def test_what_is_missing_leaves_the_models_out(
    cda: Cda, finished: Path, other: Path, text: Path, tmp_path: Path, missing: str
) -> None:
    """The records still compare; --eval and options of an evaluation want the models."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if missing == "checkpoints":
        shutil.rmtree(run / "checkpoints")
        words = f"{run} has no checkpoint"
    else:
        saved = load(Run(run).checkpoints()[-1])
        saved.state["config"]["data"]["source"] = str(tmp_path / "gone.txt")
        publish(run, step=7, model=saved.model, optimizer={}, rng={}, state=saved.state)
        words = f"the text of the run, {tmp_path / 'gone.txt'}, has gone"
    done = cda("compare", run, other)
    assert (done.code, done.err) == (0, "")
    assert f"No model was evaluated: {words}" in done.out
    assert words in json.loads(cda("compare", run, other, "--json").out)["not_evaluated"]
    for wanted in (["--eval"], ["--max-batches", 1]):
        assert_refused(cda("compare", run, other, *wanted), words)


def test_a_condition_fails_the_command(cda: Cda, recorded: tuple[str, str]) -> None:
    done = cda("compare", *recorded, "--no-eval", "--fail-if", "B.tokens_per_second < 800")
    assert done.code == 3
    assert "B.tokens_per_second is 500" in done.err


WRONG: dict[str, tuple[Callable[[str, str], list[Any]], str]] = {
    "one run": (lambda a, b: [a], "1 run was given"),
    "twice": (lambda a, b: [a, f"./{a}/"], "is given twice"),
    "nothing there": (lambda a, b: [a, "nowhere"], "nowhere does not exist"),
    "no run": (lambda a, b: [a, "."], "holds no run"),
    "a file": (lambda a, b: [a, f"{a}/config.yaml"], "holds no run"),
    "a checkpoint": (lambda a, b: [a, f"{b}/checkpoints/step-00000040"], "is a checkpoint; give its run"),
    "no models but cuts": (lambda a, b: [a, b, "--no-eval", "--cut", "top:1"], "--no-eval opens no model"),
    "no folder for the page": (lambda a, b: [a, b, "--html", "no/page.html"], "make no first"),
    "a folder as the page": (lambda a, b: [a, b, "--html", "."], "is a folder"),
    "no such figure": (lambda a, b: [a, b, "--no-eval", "--fail-if", "loss > 1"], "name a number of --json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_a_sentence(cda: Cda, recorded: tuple[str, str], case: str) -> None:
    arguments, words = WRONG[case]
    assert_refused(cda("compare", *arguments(*recorded)), words)
