"""A run on a synthetic task: it trains, resumes to the same bits, is evaluated and prompted, and refuses other data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cda_cli.storage import locate
from tests.commands.helpers import TINY, Cda, assert_refused, metrics, run_cda

SORT = "task:sort?length=4..12&vocab=8"


def trained(settings: Path, run: Path, *more: object) -> None:
    result = run_cda("train", "--config", settings, "--data", SORT, "--out", run, *more)
    assert result.code == 0, result.err


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "sort.yaml"
    path.write_text(TINY + "  sample_every: 6\n  sample_tokens: 40\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sorting(tmp_path_factory: pytest.TempPathFactory, settings: Path) -> Path:
    """A run of six steps. Only to be read."""
    run = tmp_path_factory.mktemp("sorting") / "run"
    trained(settings, run)
    return run


def test_a_run_that_was_cut_ends_on_the_same_bits(sorting: Path, settings: Path, tmp_path: Path) -> None:
    """The examples of its second half are those that a run without a cut sees."""
    trained(settings, tmp_path / "run", "--steps", 4, "--set", "optim.schedule_steps=6")
    trained(settings, tmp_path / "run", "--steps", 6)
    ends = [locate(run) for run in (tmp_path / "run", sorting)]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "tokenizer.json"):
        one, other = ((end / name).read_bytes() for end in ends)
        assert one == other, f"{name} differs at the end"


def test_the_position_counts_examples(sorting: Path) -> None:
    state = json.loads((locate(sorting) / "state.json").read_text())
    assert state["position"] == {"seed": 0, "position": 6 * 4, "task": SORT, "seq_len": 32}
    assert state["data"]["task"] == SORT


def test_a_run_goes_on_with_its_own_task_alone(cda: Cda, sorting: Path, settings: Path) -> None:
    result = cda("train", "--config", settings, "--data", "task:copy?length=4..12&vocab=8", "--out", sorting, "-s", 9)
    assert_refused(result, "holds another run", SORT)


def test_its_sample_begins_with_a_whole_prompt(sorting: Path) -> None:
    """A prompt that ends within the sequence has no answer yet."""
    (sample,) = metrics(sorting, "sample")
    prompt, arrow, _ = sample["text"].partition("▸")
    assert arrow
    assert prompt.startswith("<bos> ")
    assert prompt.endswith(" <sep>")


def test_eval_measures_the_answers_alone(cda: Cda, sorting: Path) -> None:
    """Each of the 1024 examples has its symbols and <eos> as targets: five to thirteen, so that nine is their mean."""
    result = cda("eval", sorting, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["windows"] == 1024
    error = math.sqrt((9**2 - 1) / 12 * 1024)
    assert abs(found["tokens"] - 9 * 1024) < 5 * error
    assert found["data"] == "task:sort, length 4..12, vocab 8"
    assert found["counted"] == "each token of the answers"
    assert found["words"] == found["tokens"] - 1024, "<eos> is no word, and each symbol is one"


def test_an_evaluation_of_answers_goes_on_to_the_same_figures(cda: Cda, sorting: Path, tmp_path: Path) -> None:
    options = ("--max-batches", 3, "--losses", tmp_path / "losses.jsonl", "--json")
    first, again = (cda("eval", sorting, *options) for _ in range(2))
    assert first.code == 0, first.err
    assert json.loads(again.out) == json.loads(first.out)


@pytest.mark.parametrize("option", [("--context", 16), ("--stride", 16), ("--per-document",)])
def test_an_example_is_not_cut_apart(cda: Cda, sorting: Path, option: tuple[object, ...]) -> None:
    assert_refused(cda("eval", sorting, *option), "a task has an example in each window", "leave --context, --stride")


def test_sample_answers_a_prompt(cda: Cda, sorting: Path) -> None:
    result = cda("sample", sorting, "--prompt", "<bos> 3 1 2 <sep>", "--max-new-tokens", 3, "--temperature", 0)
    assert result.code == 0, result.err
    assert result.out.startswith("<bos> 3 1 2 <sep> ")


def test_other_data_is_refused_in_a_sentence(cda: Cda, sorting: Path, finished: Path, text: Path) -> None:
    remedy = "give the vocab of its own task, or train one with --data 'task:sort?vocab=9'"
    assert_refused(cda("eval", sorting, "--data", "task:sort?vocab=9"), "the 9 symbols of task:sort", remedy)
    assert_refused(cda("eval", finished, "--data", "task:sort"), "the 32 symbols of task:sort")
    assert_refused(cda("eval", sorting, "--data", text), "cannot encode the text")
    assert_refused(cda("eval", sorting, "--split", "train"), "has one side to evaluate; leave --split out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((SORT, "--tokenizer", "bpe:300"), "has tokens of its own; leave out data.tokenizer"),
        ((SORT, "--streaming"), "has tokens of its own; leave out data.streaming"),
        ((SORT, "--seq-len", 26), "has up to 27 tokens, and seq_len is 26; give --seq-len 27, or a smaller length"),
        (("task:sort?vocab=1",), "greater than or equal to 2"),
        (("task:sorted",), "did you mean 'sort'?"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    cda: Cda, settings: Path, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    result = cda("train", "--config", settings, "--out", tmp_path / "run", "--data", *arguments)
    assert_refused(result, words)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_weights_of_one_task_start_another_of_the_same_symbols(
    cda: Cda, sorting: Path, settings: Path, tmp_path: Path
) -> None:
    start = ("train", "--config", settings, "--init-from", sorting, "--steps", 1)
    result = cda(*start, "--data", "task:copy?length=4..12&vocab=8", "--out", tmp_path / "copy")
    assert result.code == 0, result.err
    assert "cda sample" not in result.err, "its prompt would be text"
    result = cda(*start, "--data", "task:copy?length=4..12&vocab=9", "--out", tmp_path / "larger")
    assert_refused(result, "the 9 symbols of task:copy")


def test_eval_scores_tasks_by_length(cda: Cda, sorting: Path, tmp_path: Path) -> None:
    """Also where an example is longer than the context of training, since the positions are rotary. Each length is
    kept by itself, and what is kept is not computed again."""
    arguments = ("eval", sorting, "--results", tmp_path / "kept", "--limit", 20, "--tasks", "task:sort,task:copy")
    first = json.loads(cda(*arguments, "--lengths", 20, "--json").out)["tasks"]
    found = cda(*arguments, "--lengths", "4,20", "--json")
    assert "2 results of an earlier evaluation" in found.err
    tasks = json.loads(found.out)["tasks"]
    assert list(tasks) == [f"task:{name}?length={length}&vocab=8" for name in ("sort", "copy") for length in (4, 20)]
    assert {name: tasks[name] for name in first} == first
    assert {score["metrics"]["solver_exact_match,none"] for score in tasks.values()} == {1.0}
    table = cda(*arguments, "--lengths", "4,20").out
    assert "20 examples of each length" in table
    assert [line.split()[:2] for line in table.splitlines() if line.startswith("task:copy")] == [
        ["task:copy?vocab=8", "4"], ["task:copy?vocab=8", "20"],
    ]  # fmt: skip


def test_a_model_that_cannot_take_a_task_is_refused_before_any_is_scored(
    cda: Cda, sorting: Path, finished: Path, settings: Path, tmp_path: Path
) -> None:
    start = ("train", "--config", settings, "--data", SORT, "--steps", 1, "--set", "model.position=learned")
    assert cda(*start, "--out", tmp_path / "learned").code == 0
    asked = ("--tasks", "task:sort", "--lengths", "12,20", "--results", tmp_path / "kept")
    assert_refused(cda("eval", sorting, finished, *asked), f"{finished}", "was not trained on the 8 symbols")
    assert_refused(
        cda("eval", sorting, tmp_path / "learned", *asked),
        "has learned positions for 32 tokens, and task:sort?length=20&vocab=8 takes 42; give smaller --lengths",
    )
    assert not (tmp_path / "kept").exists()


def test_checkpoints_are_scored_in_the_same_tasks(cda: Cda, sorting: Path, tmp_path: Path) -> None:
    """Those of the first, in one table and one picture."""
    arguments = ("eval", sorting, sorting, "--results", tmp_path / "kept", "--limit", 5, "--tasks", "task:sort")
    found = cda(*arguments, "--plot", tmp_path / "lengths.png", "--json")
    assert found.code == 0, found.err
    one, other = json.loads(found.out)["checkpoints"]
    assert one == other
    figure = "checkpoints[1].tasks.task:sort?length=12&vocab=8.metrics.solver_exact_match,none"
    assert cda(*arguments, "--fail-if", f"{figure} < 1").code == 0
    failed = cda(*arguments, "--json", "--fail-if", f"{figure} <= 1")
    assert (failed.code, json.loads(failed.out)) == (3, json.loads(found.out))
    assert f"{figure} is 1" in failed.err
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in cda(*arguments).out.splitlines() if line.startswith("task:sort")]
    assert [row[:3] for row in rows] == [["task:sort?vocab=8", "12", "1"], ["task:sort?vocab=8", "12", "2"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "task:sort", "--lengths", "4,x"), "--lengths 4,x names no lengths; give whole numbers"),
        (("--tasks", "task:sort", "--lengths", "0"), "task:sort has no example of length 0"),
        (("--tasks", "task:sorted"), "there is no task 'sorted': did you mean 'sort'?"),
        (("--lengths", "4"), "--lengths is about tasks; name them with --tasks"),
        (("--tasks", "task:sort", "--num-fewshot", "2"), "--num-fewshot says nothing of synthetic tasks"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(
    cda: Cda, sorting: Path, arguments: tuple[object, ...], words: str
) -> None:
    assert_refused(cda("eval", sorting, *arguments), words)
