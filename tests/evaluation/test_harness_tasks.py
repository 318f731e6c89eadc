"""`cda eval --tasks` with local tasks of lm-evaluation-harness, against its own model `hf` on the exported folder."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets.config
import huggingface_hub.constants
import pytest
import torch

from cda_cli.data import Tokenizer, load_tokenizer, tokenizer_from_json
from cda_cli.errors import ConfigError, InterruptedRunError
from cda_cli.evaluation.tasks import Scorer, TaskOptions, evaluate_tasks, find_tasks
from cda_cli.evaluation.tasks.harness_model import HarnessModel
from cda_cli.interchange.hf_files import write_hf
from cda_cli.restore import Restored, restore
from cda_cli.signals import StopRequest
from tests.commands.helpers import Result, assert_refused, run_cda
from tests.data.tokenizer_kinds import byte_level
from tests.interchange.checkpoints import save_checkpoint

SEQ_LEN = 48
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "big", "dog", "near", "my", "old", "house"]
NAMES = ["choose", "perplexity", "answer"]
YAML = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    "training_split: train\nmetric_list: [{metric: acc}, {metric: acc_norm}]\nmetadata: {version: 1.5}\n",
    "perplexity": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{question}}:'\ndoc_to_target: text\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the hub, and what datasets prepares goes where the test is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write_tasks(folder: Path) -> Path:
    """Writes the three tasks and a group of two. Some contexts and texts are longer than the context of the model."""
    folder.mkdir()
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    lines = [
        {
            "question": words(2, 14), "choices": [words(1, 3) for _ in range(4)], "gold": draw.randrange(4),
            "text": words(1, 40),
        }
        for _ in range(7)
    ]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, rest in YAML.items():
        files = f"dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}\n"
        text = f"task: {name}\ndataset_path: json\n{files}test_split: test\n{rest}"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    group = "group: both\ntask: [choose, answer]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "both.yaml").write_text(group, encoding="utf-8")
    return folder


def with_bos() -> Tokenizer:
    inner = byte_level()
    inner.add_special_tokens(["<s>", "</s>"])
    return tokenizer_from_json(inner.to_str(), bos="<s>", eos="</s>")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": functools.partial(load_tokenizer, "bytes"),
    "begins with <s>": with_bos,
}


class Found(NamedTuple):
    """What a model answered to each request, and the metrics that follow."""

    answers: dict[str, list[Any]]
    results: dict[str, dict[str, Any]]


def found(model: Any, include: Path, num_fewshot: int = 0) -> Found:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(include), include_defaults=False).load(list(NAMES))
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(1234)
    evaluated = evaluate(model, loaded, bootstrap_iters=0)
    answers = {name: [sample["resps"] for sample in evaluated["samples"][name]] for name in NAMES}
    return Found(answers, evaluated["results"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint without training, alone in its run."""
    settings = {"attention": "coordinate-descent", "null_kv": 1, "tied_embeddings": True, "position": "rotary"}
    return save_checkpoint(tmp_path / "run", seq_len=SEQ_LEN, **settings)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_the_answers_are_those_of_hf_on_the_exported_folder(tmp_path: Path, tokenizer: Callable[[], Tokenizer]) -> None:
    """Of each kind of request, at batch sizes 1 and 8, with a token that begins a text and without."""
    from lm_eval.models.huggingface import HFLM

    import cda_cli.interchange.hf  # noqa: F401 - makes the model known to transformers

    chosen, include = tokenizer(), write_tasks(tmp_path / "tasks")
    path = save_checkpoint(
        tmp_path / "run", seq_len=SEQ_LEN, vocab_size=chosen.vocab_size, attention="coordinate-descent", null_kv=1,
        tied_embeddings=True,
    )  # fmt: skip
    # The checkpoint has no tokenizer of its own, so that one of bytes is restored.
    restored = restore(path, torch.device("cpu"))._replace(tokenizer=chosen)
    (tmp_path / "exported").mkdir()
    write_hf(restored, tmp_path / "exported")
    theirs = found(HFLM(str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=3), include, 1)
    for batch_size in (1, 8):
        model = HarnessModel(Scorer(restored, torch.float32, batch_size))
        ours = found(model, include, 1)
        assert ours.answers["answer"] == theirs.answers["answer"]
        for name in ("choose", "perplexity"):
            for mine, their in zip(ours.answers[name], theirs.answers[name], strict=True):
                assert flat(mine) == pytest.approx(flat(their), rel=1e-5)
        for name in NAMES:
            values = {key: value for key, value in theirs.results[name].items() if isinstance(value, float)}
            assert {key: ours.results[name][key] for key in values} == pytest.approx(values, rel=1e-4)
        assert model.truncated > 0, "no context was longer than the model's"
    assert any(answer[0][0].strip() for answer in theirs.answers["answer"]), "nothing was generated"


def flat(answer: Any) -> list[float]:
    return [float(part) for each in answer for part in (flat(each) if isinstance(each, (list, tuple)) else [each])]


def evaluated(checkpoint: Path, tasks: str, include: Path, *options: object) -> Result:
    result = run_cda("eval", checkpoint, "--tasks", tasks, "--include", include, "--json", *options)
    assert result.code == 0, result.err
    return result


def test_the_command_prints_and_keeps_each_result(checkpoint: Path, tmp_path: Path) -> None:
    """Also those of a group. The second time nothing is computed, and stdout is the same."""
    include = write_tasks(tmp_path / "tasks")
    first = evaluated(checkpoint, "perplexity,both", include, "--num-fewshot", 2, "--limit", 5)
    document, expected = json.loads(first.out), found(model_of(checkpoint), include).results
    assert (document["checkpoint"], first.err) == (str(checkpoint), "")
    assert list(document["tasks"]) == ["perplexity", "choose", "answer", "both"]
    about = {name: (one["version"], one["num_fewshot"], one["documents"]) for name, one in document["tasks"].items()}
    assert about["choose"] == ("1.5", 2, 5)
    assert document["tasks"]["both"]["metrics"]["acc,none"] == document["tasks"]["choose"]["metrics"]["acc,none"]
    files = sorted((tmp_path / "run/evaluations").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["answer", "choose", "perplexity"]
    times = [file.stat().st_mtime_ns for file in files]
    second = evaluated(checkpoint, "perplexity,both", include, "--num-fewshot", 2, "--limit", 5)
    assert second.out == first.out
    assert "3 results of an earlier evaluation came from" in second.err
    assert [file.stat().st_mtime_ns for file in files] == times
    all_documents = json.loads(evaluated(checkpoint, "perplexity", include, "--results", tmp_path / "other").out)
    assert len(list((tmp_path / "other").iterdir())) == 1
    metrics = all_documents["tasks"]["perplexity"]["metrics"]
    assert metrics["bits_per_byte,none"] == pytest.approx(expected["perplexity"]["bits_per_byte,none"], rel=1e-6)
    table = run_cda("eval", checkpoint, "--tasks", "choose", "--include", include)
    assert table.code == 0, table.err
    assert "acc_norm" in table.out
    assert "was cut from the left" in table.err


def test_several_checkpoints_score_what_each_does_alone(checkpoint: Path, tmp_path: Path) -> None:
    """The tasks are loaded once for all of them, in one table."""
    include = write_tasks(tmp_path / "tasks")
    other = save_checkpoint(tmp_path / "other", seq_len=SEQ_LEN, attention="softmax", position="rotary")
    asked = ("eval", checkpoint, other, "--tasks", "choose,answer", "--include", include)
    both = run_cda(*asked, "--json")
    assert both.code == 0, both.err
    for path, found in zip((checkpoint, other), json.loads(both.out)["checkpoints"], strict=True):
        assert found["results"] == str(path.parent.parent / "evaluations")
        alone = evaluated(path, "answer,choose", include, "--results", tmp_path / "alone")
        assert found["tasks"] == json.loads(alone.out)["tasks"]
    header = next(line for line in run_cda(*asked).out.splitlines() if line.startswith("task"))
    assert header.split()[-4:] == ["checkpoint", "1", "checkpoint", "2"]


def model_of(checkpoint: Path) -> HarnessModel:
    return HarnessModel(Scorer(restore(checkpoint, torch.device("cpu")), torch.float32))


def test_a_result_of_other_data_code_or_settings_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    include = write_tasks(tmp_path / "tasks")
    (include / "code.py").write_text("def text(doc):\n    return doc['text']\n", encoding="utf-8")
    yaml = include / "perplexity.yaml"
    yaml.write_text(yaml.read_text().replace("doc_to_target: text", "doc_to_target: !function code.text"))

    def again(*options: object) -> str:
        return evaluated(checkpoint, "perplexity", include, *options).err

    assert again() == ""
    assert "1 result of an earlier" in again()
    assert again("--limit", 3) == ""
    (include / "code.py").write_text("def text(doc):\n    return doc['text'] + '.'\n", encoding="utf-8")
    assert again() == ""
    data = include / "data.jsonl"
    data.write_text(data.read_text().replace("cat", "cow"))
    assert again() == ""
    assert "1 result of an earlier" in again()


def test_an_interrupted_evaluation_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """A signal in the second of three tasks: the first is on the disk, and the next call begins the other two only."""
    include = write_tasks(tmp_path / "tasks")
    restored: Restored = restore(checkpoint, torch.device("cpu"))
    begun: list[str] = []

    def progress(what: str, total: int, interrupts: bool = False) -> Callable[[int], None]:
        begun.append(what)
        if interrupts and what == "perplexity":
            os.kill(os.getpid(), signal.SIGINT)
        return lambda done: None

    def run(interrupts: bool) -> list[str]:
        scorer = Scorer(restored, torch.float32, progress=functools.partial(progress, interrupts=interrupts))
        with StopRequest() as stop:
            return list(evaluate_tasks(find_tasks(NAMES, TaskOptions(include)), scorer, tmp_path / "kept", stop))

    with pytest.raises(
        InterruptedRunError, match=r"results of 1 of 3 tasks are in .*kept, and the same command"
    ) as ended:
        run(interrupts=True)
    assert ended.value.exit_code == 130
    assert [file.name.split("-")[0] for file in (tmp_path / "kept").iterdir()] == ["choose"]
    begun.clear()
    assert run(interrupts=False) == NAMES
    assert begun == ["perplexity", "answer"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("dataset_path: json", "dataset_path: nobody/nothing"), "the data of the task answer is not here"),
        (("test_split: test", "test_split: tset"), "the task answer cannot be loaded"),
        (
            ("doc_to_text: '{{question}}:'", "doc_to_text: '{{question | upside_down}}'"),
            "the task answer cannot be loaded",
        ),
        (("max_gen_toks: 12", "max_gen_toks: 48"), "takes up to 48 new tokens, and the model's context is 48"),
        (("max_gen_toks: 12", "max_gen_toks: 12, num_beams: 4"), "generates with num_beams=4, which cda does not have"),
    ],
)
def test_a_task_with_a_fault_is_refused_in_a_sentence(
    checkpoint: Path, tmp_path: Path, change: tuple[str, str], fault: str
) -> None:
    include = write_tasks(tmp_path / "tasks")
    yaml = include / "answer.yaml"
    assert change[0] in yaml.read_text()
    yaml.write_text(yaml.read_text().replace(*change))
    assert_refused(run_cda("eval", checkpoint, "--tasks", "answer", "--include", include), fault)


def test_an_unknown_task_is_refused_with_the_nearest_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among those of the folder: to index lm_eval's own takes seconds."""
    from lm_eval.tasks import TaskManager

    def without_defaults(**arguments: Any) -> TaskManager:
        return TaskManager(**{**arguments, "include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)
    include = write_tasks(tmp_path / "tasks")
    result = run_cda("eval", checkpoint, "--tasks", "chose", "--include", include)
    assert_refused(result, "there is no task 'chose': did you mean 'choose'?")


def test_the_names_are_listed_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of lm_eval too, of which one folder is enough: to index all takes ten seconds."""
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "hellaswag" / "manager.py"))
    result = run_cda(
        "eval", tmp_path / "nothing", "--tasks", "list", "--include", write_tasks(tmp_path / "tasks"), "--json"
    )
    assert result.code == 0, result.err
    listed = {one["name"]: (one["kind"], one["output_type"]) for one in json.loads(result.out)["tasks"]}
    assert listed["choose"] == ("task", "multiple_choice")
    assert listed["both"] == ("group", None)
    assert listed["hellaswag"] == ("task", "multiple_choice")
    assert listed["task:sort"] == ("synthetic", None)


def test_options_without_meaning_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(run_cda("eval", checkpoint, "--limit", 3), "--limit is about tasks; name them with --tasks")
    assert_refused(run_cda("eval", checkpoint, "--num-fewshot", 0), "--num-fewshot is about tasks")
    assert_refused(run_cda("eval", checkpoint, "--tasks", "a", "--split", "all"), "--split is about a text")
    assert_refused(run_cda("eval", checkpoint, "--tasks", ","), "--tasks names no task")
    missing = run_cda("eval", checkpoint, "--tasks", "a", "--include", tmp_path / "gone")
    assert_refused(missing, "is no folder; name the folder of the YAML files")


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'cda-cli\[eval\]'"):
        find_tasks(["hellaswag"])
