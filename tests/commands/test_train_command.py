"""`cda train`: what it writes, what it prints, and what it does when it is called again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from cda_cli.config import parse, resolve
from cda_cli.storage import load, locate
from tests.commands.helpers import OVERFLOWING, Cda, assert_refused, contents, escapes, metrics, steps_saved

TRAIN_FIGURES = {
    "step", "kind", "loss", "bits_per_byte", "lr", "eps", "grad_norm", "tokens", "tokens_per_second", "seconds_left",
    "memory_bytes", "layers", "data_wait",
}  # fmt: skip
LAYER_FIGURES = {"layer", "sparsity_k", "effective_support", "capped_share", "distance_back", "active_units"}
VALIDATION_FIGURES = {
    "step", "kind", "loss", "standard_error", "perplexity", "bits_per_byte", "bits_per_byte_error", "tokens",
    "text_bytes", "windows",
}  # fmt: skip


def test_config_yaml_is_the_configuration_of_the_checkpoint(finished: Path, tiny: Path) -> None:
    """config.yaml that is not what was trained would start another run when it is given to --config."""
    written = parse(yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8")))
    assert written == parse(load(locate(finished), parts=()).state["config"])
    assert written == resolve(file=tiny)
    assert resolve(file=finished / "config.yaml") == written


def test_metrics_hold_all_figures_of_every_step(finished: Path) -> None:
    """A record that lacks a figure, or a step that lacks its record, leaves a hole in every plot."""
    train, validation = metrics(finished, "train"), metrics(finished, "validation")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in validation] == [3, 6]
    assert [record["step"] for record in metrics(finished, "checkpoint")] == [2, 4, 6]
    for record in train:
        assert set(record) == TRAIN_FIGURES
        assert [set(layer) for layer in record["layers"]] == [LAYER_FIGURES, LAYER_FIGURES]
        assert record["tokens"] == record["step"] * 4 * 32
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))
        assert record["tokens_per_second"] > 0
        assert record["memory_bytes"] > 2**20
    for record in validation:
        assert set(record) == VALIDATION_FIGURES
        assert (record["tokens"], record["windows"]) == (2 * 4 * 32, 8)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))


def test_checkpoints_are_those_of_the_settings(finished: Path) -> None:
    """The newest two stay, and the records say where each one was."""
    assert steps_saved(finished) == [4, 6]
    assert metrics(finished, "checkpoint")[-1]["path"] == str(locate(finished))
    assert load(locate(finished)).state["tokens"] == 6 * 4 * 32


def test_plain_lines_off_a_terminal(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """Escape codes or a redrawn line in a log file make it unreadable; a step without a line cannot be found in it."""
    result = cda("train", "--config", tiny, "--out", tmp_path / "run")
    assert result.code == 0
    assert result.err == ""
    assert escapes(result.out) == []
    lines = result.out.splitlines()
    for step in range(1, 7):
        assert sum(line.startswith(f"{step}/6  loss ") for line in lines) == 1, f"step {step} has no log line"
    assert sum("validation loss" in line for line in lines) == 2
    assert f"6/6  saved {tmp_path}/run/checkpoints/step-00000006" in lines


def test_the_final_table_has_the_last_figures(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The table that stays on the screen must be that of the last step, not of an earlier one."""
    result = cda("train", "--config", tiny, "--out", tmp_path / "run")
    last, validation = metrics(tmp_path / "run", "train")[-1], metrics(tmp_path / "run", "validation")[-1]
    table = result.out[result.out.index("\nstep ") :]
    assert "6 of 6" in table
    assert f"{last['loss']:.4f}" in table
    assert f"{validation['loss']:.4f} ± {validation['standard_error']:.4f}" in table
    assert f"{last['layers'][1]['effective_support']:.2f}" in table
    for heading in ("learning rate", "speed", "memory", "mean k", "effective support", "capped/k", "active units"):
        assert heading in table


def test_a_finished_run_says_so_and_changes_nothing(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, "--steps", 2)
    before = contents(run)
    for steps in (2, "0.2e1"):  # a flag's number is read as that of --set is
        result = cda("train", "--config", tiny, "--out", run, "--steps", steps)
        assert result.code == 0, result.err
        assert result.out.splitlines() == [f"{run} has all its 2 steps; raise --steps to go on"]
        assert contents(run) == before


def test_more_steps_go_on_and_the_new_schedule_is_said(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """Raising --steps stretches the cosine; a silent change of the learning rate would spoil a comparison."""
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, "--steps", 2)
    result = cda("train", "--config", tiny, "--out", run, "--steps", 4)
    assert f"resuming from {run}/checkpoints/step-00000002, step 2" in result.out
    assert "now 4 steps long and was 2; --set optim.schedule_steps=2 keeps it" in result.out
    assert [record["step"] for record in metrics(run, "train")] == [1, 2, 3, 4]
    assert steps_saved(run) == [2, 4]


def test_settings_come_from_the_run_when_only_out_is_given(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The default preset in their place would be refused, or train another model."""
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, "--steps", 2)
    before = parse(load(locate(run), parts=()).state["config"])
    assert cda("train", "--out", run, "--steps", 3).code == 0
    after = parse(load(locate(run), parts=()).state["config"])
    assert after == before.model_copy(update={"optim": before.optim.model_copy(update={"steps": 3})})


def test_settings_are_judged_together_with_those_of_the_run(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A setting that only fits the run's others must not be refused for not fitting the default preset's."""
    run, heads = tmp_path / "run", ("--set", "model.heads=3")
    cda("train", "--config", tiny, "--out", run, *heads, "--set", "model.dim=36", "--steps", 1)
    result = cda("train", "--out", run, *heads)
    assert result.code == 0, result.err


def test_a_run_without_checkpoints_keeps_its_settings(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A run that ended before its first checkpoint must start again as itself, not as the default preset."""
    run = tmp_path / "run"
    assert cda("train", "--config", tiny, "--out", run, *OVERFLOWING).code == 1
    assert not (run / "checkpoints").exists()
    result = cda("train", "--out", run, "--dry-run")
    assert result.code == 0
    assert "33.6 k parameters" in result.out


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--attn-k", "2"], "model.attn_k"),
        (["--seed", "7"], "run.seed"),
        (["--set", "data.validation_fraction=0.2"], "data.validation_fraction"),
        (["--set", "model.depth=3"], "model.depth"),
    ],
)
def test_other_settings_for_the_same_folder_are_refused(
    cda: Cda, tiny: Path, finished: Path, flags: list[str], key: str
) -> None:
    """Two histories in one folder: figures and checkpoints of different models would be mixed."""
    before = contents(finished)
    assert_refused(cda("train", "--config", tiny, "--out", finished, *flags), "holds another run", key, "another --out")
    assert contents(finished) == before


def test_preset_file_set_and_flags_win_in_that_order(cda: Cda, text: Path, tmp_path: Path) -> None:
    """Each layer sets a key that the next one overrides, and one that stays."""
    file = tmp_path / "file.yaml"
    file.write_text("model: {dim: 16, depth: 1, heads: 2, seq_len: 8}\noptim: {lr: 0.5, clip: 0.25}\n", "utf-8")
    result = cda(
        "train", "--preset", "seed", "--config", file, "--set", "optim.lr=0.125", "--set", "model.seq_len=12",
        "--seq-len", 16, "--set", "model.ff_k=8", "--data", text, "--steps", 1, "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    config = resolve(file=tmp_path / "run" / "config.yaml")
    assert config.model.seq_len == 16, "a flag did not win over --set"
    assert config.optim.lr == 0.125, "--set did not win over the file"
    assert (config.model.dim, config.optim.clip) == (16, 0.25), "the file did not win over the preset"
    assert (config.model.solver, config.model.n_iters) == ("iterative", 25), "the preset was lost"


def test_the_run_folder_is_named_after_the_file_by_default(
    cda: Cda, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cda("train", "--config", tiny, "--steps", 1).code == 0
    assert steps_saved(tmp_path / "runs" / "tiny") == [1]


def test_samples_are_printed_and_recorded(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The same step gives the same text, so that two runs can be compared by it."""
    texts = []
    for name in ("a", "b"):
        sampling = ("--sample-every", 2, "--set", "run.sample_tokens=40")
        result = cda("train", "--config", tiny, "--out", tmp_path / name, *sampling, "--steps", 2)
        assert "2/2  sample" in result.out
        assert "▸" in result.out
        assert escapes(result.out) == []
        texts += [record["text"] for record in metrics(tmp_path / name, "sample")]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert len(texts[0].partition("▸")[2]) <= 40


def test_k_beyond_the_row_is_said(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A k that covers every key makes the attention a plain sum: allowed, but hardly meant."""
    run = ("train", "--config", tiny, "--out", tmp_path / "run", "--dry-run")
    assert "attn_k 40 covers all 33 keys of a row" in cda(*run, "--attn-k", 40).out
    ff = ("--ff", "coordinate-descent", "--ff-k", 128)
    assert "ff_k 128 covers all 128 units of a row" in cda(*run, *ff).out
    assert "covers" not in cda(*run).out


def test_metrics_are_json_to_a_strict_reader(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A validation of one window has no standard error; NaN in its place is no JSON, and jq or a browser refuse it."""
    run, one = tmp_path / "run", ("--steps", 1, "--batch-size", 1, "--set", "run.eval_batches=1")
    cda("train", "--config", tiny, "--out", run, *one)
    assert metrics(run, "validation")[0]["windows"] == 1
    assert "NaN" not in (run / "metrics.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["run[bold]", "run[/x]", "run :smile:"])
def test_brackets_in_a_path_are_no_markup(cda: Cda, tiny: Path, tmp_path: Path, name: str) -> None:
    """Taken for markup, part of the path is not shown, or the run ends with an error before it began."""
    result = cda("train", "--config", tiny, "--out", tmp_path / name, "--dry-run")
    assert result.code == 0, result.err
    assert str(tmp_path / name) in result.out
