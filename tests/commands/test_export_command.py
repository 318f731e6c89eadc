"""`cda export`: what it writes, and that it writes nothing where it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from cda_cli.commands import export as command
from cda_cli.interchange import export
from tests.commands.forked import run_forked
from tests.commands.helpers import Cda, assert_refused, contents, metrics

HF_FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_cda.py", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def card(folder: Path) -> tuple[dict[str, object], str]:
    """The header of a model card, and its text."""
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_run_becomes_a_folder(cda: Cda, finished: Path, tmp_path: Path) -> None:
    result = cda("export", finished, tmp_path / "model", "--license", "mit")
    assert result.code == 0, result.err
    assert set(contents(tmp_path / "model")) == HF_FILES
    assert "step-00000006" in result.out
    header, text = card(tmp_path / "model")
    assert header["license"] == "mit"
    validation = metrics(finished, "validation")[-1]
    layers = metrics(finished, "train")[-1]["layers"]
    assert f"{validation['loss']:.4f} ± {validation['standard_error']:.4f} nats per token" in text
    assert f"{validation['bits_per_byte']:.4f} ± " in text
    assert f"| {layers[1]['effective_support']:.4g} |" in text
    assert "active_units" in text
    assert "active_blocks" not in text, "the run has no router"
    assert "6 steps, 768 tokens" in text
    assert str(finished) not in text, "the card tells where the run lies"


def test_the_formats_are_those_that_are_offered() -> None:
    """The command names them without the imports that writing them needs."""
    assert tuple(export.FORMATS) == command.FORMATS


def test_figures_that_the_run_has_not_are_not_there(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Step 4 has a checkpoint and no validation. A checkpoint that lies elsewhere has no run."""
    assert cda("export", finished / "checkpoints/step-00000004", tmp_path / "model").code == 0
    text = card(tmp_path / "model")[1]
    assert "The run has not measured this checkpoint." in text
    assert "Measured at training step 4" in text
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name, data in contents(finished / "checkpoints/step-00000006").items():
        (copy / name).write_bytes(data or b"")
    assert cda("export", copy, tmp_path / "other").code == 0
    text = card(tmp_path / "other")[1]
    assert "The run has not measured this checkpoint." in text
    assert "The run has no record of what its layers select." in text


def test_best_is_the_best_checkpoint(cda: Cda, finished: Path, tmp_path: Path) -> None:
    result = cda("export", finished, tmp_path / "model", "--best", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["checkpoint"].endswith("step-00000006")
    assert document["files"] == {name: (tmp_path / "model" / name).stat().st_size for name in sorted(HF_FILES)}


def test_an_empty_folder_is_filled_and_a_full_one_refused(cda: Cda, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert cda("export", finished, folder).code == 0
    before = contents(tmp_path)
    assert_refused(cda("export", finished, folder), f"{folder} is not empty; give the name of a new folder")
    assert_refused(cda("export", finished, folder / "config.json"), "is a file; give the name of a new folder")
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_leaves_nothing(cda: Cda, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000006"
    copy.mkdir()
    for name, data in contents(finished / "checkpoints/step-00000006").items():
        (copy / name).write_bytes((data or b"")[: -8 if name == "model.safetensors" else None])
    before = contents(tmp_path)
    assert_refused(cda("export", copy, tmp_path / "model"), "model.safetensors has", "use an earlier checkpoint")
    assert contents(tmp_path) == before


def test_a_failed_write_leaves_nothing(cda: Cda, finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.write_text("in the way", encoding="utf-8")
    before = contents(tmp_path)
    assert_refused(cda("export", finished, place / "model"), "could not write")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "hff"), "unknown format 'hff': did you mean 'hf'?"),
        (("--dry-run",), "--dry-run lists what --push-to would send; give --push-to OWNER/NAME"),
        (("--push-to", "me"), "--push-to takes OWNER/NAME, not 'me'"),
        (("--push-to", "a/b/c"), "--push-to takes OWNER/NAME, not 'a/b/c'"),
        (("--push-to", "me/my model"), "--push-to takes OWNER/NAME, not 'me/my model'"),
        (("--push-to", "me/a..b"), "--push-to takes OWNER/NAME, not 'me/a..b'"),
        (("--push-to", "me/-"), "--push-to takes OWNER/NAME, not 'me/-'"),
        (("--ema",), "has no moving average of the weights"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[str, ...], words: str, cda: Cda, finished: Path, tmp_path: Path
) -> None:
    assert_refused(cda("export", finished, tmp_path / "model", *arguments), words)
    assert not (tmp_path / "model").exists()


def test_a_dry_run_sends_and_writes_nothing(
    cda: Cda, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for no token and no network: a connection would be refused at once."""
    monkeypatch.setattr("socket.socket.connect", None)
    result = cda("export", finished, tmp_path / "model", "--push-to", "me/model", "--dry-run")
    assert result.code == 0, result.err
    assert all(name in result.out for name in HF_FILES)
    assert "me/model" in result.out
    assert "dry run: nothing was sent" in result.out
    assert not (tmp_path / "model").exists()


def test_a_hub_out_of_reach_is_one_sentence_and_the_folder_is_whole(
    cda: Cda, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "none")
    folder = tmp_path / "model"
    result = cda("export", finished, folder, "--push-to", "me/model")
    assert_refused(result, "me/model was not sent", f"hf upload me/model {folder}")
    assert set(contents(folder)) == HF_FILES


def without_the_extra() -> None:
    """Has each import of these packages fail, none of which this process has imported."""
    for name in ("transformers", "accelerate", "gguf"):
        assert name not in sys.modules
        sys.modules[name] = None  # type: ignore[assignment]


def test_it_needs_no_transformers(finished: Path, tmp_path: Path) -> None:
    """An installation without the extra has none of these."""
    done = run_forked("export", finished, tmp_path / "model", first=without_the_extra)
    assert done.code == 0, done.err
    assert set(contents(tmp_path / "model")) == HF_FILES
