"""What is compared of the records: losses at equal tokens and at equal time, and whether the runs are comparable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cda_cli.comparison.comparable import facts
from cda_cli.comparison.curves import curves
from cda_cli.comparison.recorded import read_runs
from cda_cli.comparison.result import result
from cda_cli.runs.folder import Run
from tests.comparison.runs import write_run
from tests.runs.records import VALIDATION

TEXT = {"tokenizer": "bytes", "content": ["a", "b"]}


def test_losses_are_read_off_at_equal_tokens_and_at_equal_time(tmp_path: Path) -> None:
    """B takes as many tokens in half the time, so at equal time it is as far as A, and A is where B was halfway."""
    a = write_run(tmp_path / "a", [8.0, 6.0, 5.0, 4.5], tokens_per_second=1000.0)
    b = write_run(tmp_path / "b", [7.0, 5.0, 4.0, 3.0], tokens_per_second=2000.0)
    found = curves(read_runs([a, b]))
    assert found.kind == "validation"
    assert [(each.at, each.bits_per_byte) for each in found.tokens] == [
        (1000.0, [8.0, 7.0]), (2000.0, [6.0, 5.0]), (3000.0, [5.0, 4.0]), (4000.0, [4.5, 3.0]),
    ]  # fmt: skip
    assert found.seconds[-1].at == 2.0
    assert found.seconds[-1].bits_per_byte == [6.0, 3.0]
    assert found.seconds[2].at == 1.5
    assert found.seconds[2].bits_per_byte == [7.0, 4.0], "A is between two of its records there"


def test_the_shorter_run_says_where_losses_are_compared(tmp_path: Path) -> None:
    long = write_run(tmp_path / "long", [8.0, 6.0, 5.0, 4.5])
    short = write_run(tmp_path / "short", [8.5, 6.5], tokens_per_step=75)
    found = curves(read_runs([long, short]))
    assert [each.at for each in found.tokens] == [375.0, 750.0, 1125.0, 1500.0]
    assert found.tokens[-1].bits_per_byte == [7.0, 6.5]


@pytest.mark.parametrize("bits", [[8.0, 6.0], [8.0]], ids=["no validation", "a single record"])
def test_without_validations_in_each_run_the_training_losses_are_compared(tmp_path: Path, bits: list[float]) -> None:
    """A validation of one run and a training loss of another would not compare."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", bits, validated=len(bits) == 1)]
    found = curves(read_runs(runs))
    assert found.kind == "training"
    assert found.tokens[-1].bits_per_byte == [dict(zip((1, 2), (8.0, 6.0), strict=True))[len(bits)], bits[-1]]


def test_a_run_without_records_leaves_nothing_to_compare_at_equal_tokens(tmp_path: Path) -> None:
    """As one that `cda import` made."""
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "imported", [])])
    found = curves(runs)
    assert (found.tokens, found.seconds) == ([], [])
    tokens = facts(runs)["tokens"]
    assert tokens.is_same is None
    assert tokens.sentence.startswith("A 4,000, B not recorded;")


def test_a_validation_after_the_newest_train_record_leaves_the_others_to_compare(tmp_path: Path) -> None:
    """As of a run that goes on, or was killed, between its train records."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    metrics = Run(runs[1]).open_metrics(40)
    metrics.write(replace(VALIDATION, step=45, bits_per_byte=4.0))
    metrics.close()
    assert [each.at for each in curves(read_runs(runs)).tokens] == [1000.0, 2000.0, 3000.0, 4000.0]


CHANGES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "nothing": ({}, {}),
    "text": ({"text": {**TEXT, "content": ["a", "c"]}}, {"data": False}),
    "tokenizer": ({"text": {**TEXT, "tokenizer": "bpe"}}, {"tokenizer": False}),
    "seed": ({"flags": {"run.seed": 1}}, {"seed": False}),
    "context": ({"flags": {"model.seq_len": 64}}, {"context": False}),
    "schedule": ({"flags": {"optim.schedule": "constant"}}, {"schedule": False}),
    "validation text": ({"flags": {"data.validation_fraction": 0.2}, "text": None}, {"data": False, "state": False}),
    "length": ({"bits": [8.0, 6.0]}, {"tokens": False, "schedule": False}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_fact_says_what_is_not_the_same(tmp_path: Path, change: str) -> None:
    arguments, differ = CHANGES[change]
    runs = read_runs([write_run(tmp_path / "a", text=TEXT), write_run(tmp_path / "b", **{"text": TEXT, **arguments})])
    found = {name: fact.is_same for name, fact in facts(runs).items()}
    assert {name: same for name, same in found.items() if same is False} == differ
    assert found["machine"] is None, "no record says on which machine a run was"


def test_an_unfinished_run_is_told(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", text=TEXT)
    cut = write_run(tmp_path / "cut", [8.0, 6.0, 5.0], text=TEXT, flags={"optim.steps": 40})
    found = facts(read_runs([done, cut]))
    assert found["state"].is_same is False
    assert "B interrupted at step 30 of 40" in found["state"].sentence


def test_runs_that_differ_in_their_seed_alone_are_grouped(tmp_path: Path) -> None:
    seeds = {"A": (0, 2.0), "B": (0, 8.0), "C": (1, 2.0), "D": (1, 8.0), "E": (1, 4.0)}
    runs = [
        write_run(tmp_path / name, flags={"run.seed": seed, "model.attn_k": k}) for name, (seed, k) in seeds.items()
    ]
    assert result(read_runs(runs), None, "").seed_groups == ["AC", "BD"]


def test_runs_that_came_to_unequal_steps_differ_in_more_than_their_seeds(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole")
    cut = write_run(tmp_path / "cut", [8.0, 6.0], flags={"run.seed": 1, "optim.steps": 40})
    assert result(read_runs([whole, cut]), None, "").seed_groups == []


def test_a_run_without_a_checkpoint_has_the_tokenizer_of_its_settings(tmp_path: Path) -> None:
    """The other run has a fingerprint, which is no name of a setting."""
    trained = write_run(tmp_path / "trained", text={**TEXT, "tokenizer": "952b28df73e824ba"})
    begun = write_run(tmp_path / "begun", [8.0])
    assert facts(read_runs([trained, begun]))["tokenizer"].is_same is True


def test_tokenizers_of_one_name_are_not_told_apart_by_it(tmp_path: Path) -> None:
    """As bpe:8192 of two texts."""
    runs = [write_run(tmp_path / name, text={**TEXT, "tokenizer": name}) for name in ("a", "b")]
    assert facts(read_runs(runs))["tokenizer"].sentence.startswith("only bits per byte compare")
