"""Tasks in a folder of the CORE format, with results that one can count."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cda_cli.errors import CdaError, ConfigError, DataError
from cda_cli.evaluation.tasks import Scorer, TaskOptions, TaskResult, find_tasks
from cda_cli.restore import Restored
from tests.evaluation.models import successor_model

# The model of these tests expects the alphabet to go on, so a choice is worth the share of its letters that follow.
CHOICES: list[dict[str, Any]] = [
    # The x that both begin with is not predicted: "yz" goes on after it, and "q" does not.
    {"query": "one", "choices": ["xyz", "xq"], "gold": 0},
    # By the sum of its losses the shorter one would win. By their mean "mnopq" does, with four of five letters.
    {"query": "two", "choices": ["k", "mnopq"], "gold": 1},
    # No choice may be without a predicted token: the "q" is, and loses to the same "q" with what goes on after it.
    {"query": "three", "choices": ["q", "qrstu"], "gold": 0},
]
SCHEMAS: list[dict[str, Any]] = [
    # Only the common end is predicted: it goes on after "ab" and not after "az".
    {"context_options": ["say az", "say ab"], "continuation": "cd", "gold": 1},
    {"context_options": ["the b", "the q"], "continuation": "rs", "gold": 0},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"context": "  abc  ", "continuation": "def"},
    {"context": "abc", "continuation": "deg"},
]


def write_folder(folder: Path, **changes: Any) -> Path:
    """Writes the three tasks. A change replaces the settings of a task, or the lines of its data."""
    (folder / "eval_data" / "more").mkdir(parents=True)
    tasks = {
        "choose": ("multiple_choice", "choose.jsonl", CHOICES, 25),
        "refer": ("schema", "more/refer.jsonl", SCHEMAS, 50.0),
        "complete": ("language_modeling", "complete.jsonl", COMPLETIONS, 0),
    }
    entries, table = [], ["Eval Task,Task Category,Random baseline"]
    for label, (kind, file, lines, baseline) in tasks.items():
        entry = {"label": label, "dataset_uri": file, "num_fewshot": [0, 9], "icl_task_type": kind}
        entries.append({**entry, "continuation_delimiter": "", "has_categories": True, **changes.get(label, {})})
        text = "\n".join(json.dumps(line) for line in lines) + "\n"
        (folder / "eval_data" / file).write_text(changes.get(file, text), encoding="utf-8")
        table.append(f"{label},any,{baseline}")
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text("\n".join(table), encoding="utf-8")
    return folder


def scored(
    folder: Path, restored: Restored | None = None, batch_size: int = 4, **options: Any
) -> dict[str, TaskResult]:
    selection = find_tasks([f"core:{folder}"], TaskOptions(**options))
    scorer = Scorer(restored or successor_model(), torch.float32, batch_size)
    results = {name: task.run(scorer) for name, task in selection.tasks.items()}
    return results | {name: summarise(results) for name, summarise in selection.summaries.items()}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_results_are_those_that_one_counts(tmp_path: Path, batch_size: int) -> None:
    """Centred, chance is 0 and all right is 1: 2 of 3 among four choices each would be (2/3 − 1/4) / (3/4)."""
    found = scored(write_folder(tmp_path), batch_size=batch_size)
    assert {name: one.metrics.get("acc,none") for name, one in found.items()} == {
        "core:choose": 2 / 3, "core:refer": 0.5, "core:complete": 0.5, "CORE": None,
    }  # fmt: skip
    centred = {name: one.metrics["acc_centered,none"] for name, one in found.items()}
    assert centred == {
        "core:choose": pytest.approx(5 / 9), "core:refer": 0.0, "core:complete": 0.5,
        "CORE": pytest.approx((5 / 9 + 0.5) / 3),
    }  # fmt: skip
    assert found["core:choose"].metrics["acc_stderr,none"] == pytest.approx((2 / 9 / 2) ** 0.5)
    errors = [one.metrics["acc_centered_stderr,none"] for one in found.values()]
    assert errors == pytest.approx([4 / 9, 1, 0.5, ((4 / 9) ** 2 + 1 + 0.5**2) ** 0.5 / 3])
    assert [one.documents for one in found.values()] == [3, 2, 2, 7]


def by_hand(restored: Restored, lines: Sequence[dict[str, Any]], delimiter: str, shots: int) -> float:
    """The accuracy of choices that share no first letter, in the order and with the examples of nanochat."""
    items = list(lines)
    random.Random(1337).shuffle(items)
    correct = 0
    for index, item in enumerate(items):
        others = [place for place in range(len(items)) if place != index]
        chosen = [items[place] for place in random.Random(1234 + index).sample(others, shots)]
        before = "".join(f"{one['query']}{delimiter}{one['choices'][one['gold']]}\n\n" for one in chosen)
        losses = []
        for choice in item["choices"]:
            tokens = [255, *f"{before}{item['query']}{delimiter}{choice}".encode()]
            log_p = restored.model(torch.tensor([tokens[-65:-1]]))[0].double().log_softmax(-1)[-len(choice) :]
            losses.append(-log_p[range(len(choice)), list(choice.encode())].mean().item())
        correct += losses.index(min(losses)) == item["gold"]
    return correct / len(items)


def test_the_prompts_are_those_of_nanochat(tmp_path: Path) -> None:
    """With random weights each letter of a prompt matters: the examples, their order, and what stands between."""
    draw = random.Random(5)
    lines = [
        {
            "query": "".join(draw.choices("abcdef", k=4)),
            "choices": [first + "".join(draw.choices("abcdef", k=draw.randint(0, 3))) for first in "uvwx"],
            "gold": draw.randrange(4),
        }
        for _ in range(24)
    ]
    restored = successor_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in restored.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    text = "\n".join(map(json.dumps, lines))
    folder = write_folder(
        tmp_path, choose={"continuation_delimiter": "\nA: ", "num_fewshot": [2]}, **{"choose.jsonl": text}
    )
    result = find_tasks([f"core:{folder}"]).tasks["core:choose"].run(Scorer(restored, torch.float32))
    assert result.metrics["acc,none"] == by_hand(restored, lines, "\nA: ", 2)
    assert 0 < (result.metrics["acc,none"] or 0) < 1
    assert (result.num_fewshot, result.truncated) == (2, 0)


def test_the_number_of_examples_and_of_documents_can_be_given(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    found = scored(folder, limit=2, num_fewshot=1)
    assert {one.num_fewshot for name, one in found.items() if name != "CORE"} == {1}
    assert [one.documents for one in found.values()] == [2, 2, 2, 6]
    assert scored(folder, successor_model(seq_len=8), num_fewshot=1)["core:choose"].truncated > 0
    with pytest.raises(DataError, match="draws 2 examples from its other documents, of which there are 2 documents"):
        scored(folder, limit=2, num_fewshot=2)


def test_what_decides_a_result_identifies_it(tmp_path: Path) -> None:
    """A result that was kept must not stand for other data or other settings."""
    first = find_tasks([f"core:{write_folder(tmp_path / 'a')}"]).tasks["core:choose"].identity()
    assert find_tasks([f"core:{write_folder(tmp_path / 'b')}"]).tasks["core:choose"].identity() == first
    others = [
        find_tasks([f"core:{write_folder(tmp_path / 'c', **{'choose.jsonl': json.dumps(CHOICES[0])})}"]),
        find_tasks([f"core:{write_folder(tmp_path / 'd', choose={'continuation_delimiter': ': '})}"]),
        find_tasks([f"core:{tmp_path / 'a'}"], TaskOptions(limit=2)),
        find_tasks([f"core:{tmp_path / 'a'}"], TaskOptions(num_fewshot=1)),
    ]
    assert first not in [other.tasks["core:choose"].identity() for other in others]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"choose": {"icl_task_type": "multiple-choice"}}, "did you mean 'multiple_choice'"),
        ({"choose": {"num_fewshot": "many"}}, "core.yaml: num_fewshot: input should be a valid list"),
        ({"choose": {"label": "unknown"}}, "no Random baseline of unknown"),
        ({"choose": {"dataset_uri": "gone.jsonl"}}, "gone.jsonl, which is not there"),
        ({"choose.jsonl": '{"query": "a", "choices": ["b"], "gold": 0}\n{"query": '}, "line 2 of .*choose.jsonl"),
        ({"choose.jsonl": '{"query": "a", "choices": ["b"], "gold": 1}'}, "line 1 .*the index of one of the choices"),
        ({"choose.jsonl": ""}, "of which there are 0 documents"),
    ],
)
def test_a_folder_with_a_fault_is_refused_in_a_sentence(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(CdaError, match=fault):
        scored(write_folder(tmp_path, **changes))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no CORE tasks"):
        find_tasks([f"core:{tmp_path}"])
    write_folder(tmp_path)
    (tmp_path / "eval_meta_data.csv").write_text("label,chance\nchoose,25\n", encoding="utf-8")
    with pytest.raises(DataError, match="gives no Random baseline by Eval Task"):
        find_tasks([f"core:{tmp_path}"])
    (tmp_path / "core.yaml").write_text("tasks: []", encoding="utf-8")
    with pytest.raises(DataError, match="is no list of icl_tasks"):
        find_tasks([f"core:{tmp_path}"])
