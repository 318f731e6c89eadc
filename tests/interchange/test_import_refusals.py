"""What cannot be imported is refused in one sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cda_cli.errors import CdaError
from tests.interchange.models import imported, llama, randomised, save, save_tokenizer

Damage = Callable[[Path], object]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file. Only to be read."""
    return save(randomised(llama()), tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several. Only to be read."""
    return save(randomised(llama()), tmp_path_factory.mktemp("models") / "sharded", max_shard_size="20KB")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole model, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def says(**changes: Any) -> Damage:
    """Changes keys of config.json; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def holds(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Changes the tensors."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def cut(keep: float) -> Damage:
    """Cuts the weights short."""

    def shorten(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(len(data) * keep)])

    return shorten


def lacks(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def has(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


HUGE = struct.pack("<Q", 2**60) + b"{}"
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "no configuration": (lacks("config.json"), ["config.json"]),
    "a configuration that is no JSON": (has("config.json", b"{"), ["config.json", "download"]),
    "a configuration that is a list": (has("config.json", b"[]"), ["config.json"]),
    "an unknown architecture": (says(model_type="mamba"), ["'mamba'", "llama", "qwen3"]),
    "no architecture": (says(model_type=None), ["llama"]),
    "no width": (says(hidden_size=None), ["hidden_size"]),
    "another activation": (says(hidden_act="relu"), ["hidden_act", "'relu'", "silu"]),
    "other rotary positions": (says(rope_parameters={"rope_type": "longrope"}), ["'longrope'", "yarn"]),
    "a part of each head rotated": (says(partial_rotary_factor=0.5), ["part of each head"]),
    "a width that is a word": (says(hidden_size="wide"), ["wide"]),
    "an activation that is a list": (says(hidden_act=["silu"]), ["config.json", "damaged"]),
    "rotary positions that are a word": (says(rope_parameters="yarn"), ["config.json", "damaged"]),
    "quantised": (says(quantization_config={"quant_method": "gptq"}), ["quantised", "GGUF"]),
    "heads that do not divide": (says(num_attention_heads=3), ["heads"]),
    "more blocks than tensors": (says(num_hidden_layers=10**12), ["blocks", "21 tensors"]),
    "a window": (says(sliding_window=16), ["window", "--seq-len 16"]),
    "no weights": (lacks("model.safetensors"), ["model.safetensors"]),
    "pickled weights": (pickled, ["pytorch_model.bin", "safetensors"]),
    "weights cut in the middle": (cut(0.5), ["model.safetensors", "cut short"]),
    "weights cut in the header": (cut(0.001), ["model.safetensors", "cut short"]),
    "empty weights": (cut(0), ["model.safetensors", "cut short"]),
    "a header without end": (has("model.safetensors", HUGE), ["model.safetensors", "damaged"]),
    "a tensor too many": (
        holds(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora": torch.ones(2)})),
        ["model.layers.0.self_attn.q_proj.lora"],
    ),
    "a bias that the configuration does not know": (
        holds(lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.ones(64)})),
        ["model.layers.1.mlp.up_proj.bias"],
    ),
    "a tensor too few": (holds(lambda tensors: tensors.pop("model.norm.weight")), ["model.norm.weight"]),
    "a tensor of another shape": (
        holds(lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(63, 32)})),
        ["model.layers.1.mlp.up_proj.weight", "(63, 32)", "(64, 32)"],
    ),
    "a tensor of integers": (
        holds(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        ["model.norm.weight", "int8"],
    ),
    "a head that is not tied": (says(tie_word_embeddings=True), ["lm_head.weight", "tie_word_embeddings"]),
    "no tokenizer": (lacks("tokenizer.json"), ["tokenizer.json", "--tokenizer"]),
    "a damaged tokenizer": (has("tokenizer.json", b"{}"), ["tokenizer.json", "--tokenizer"]),
    "a tokenizer of a larger model": (lambda folder: save_tokenizer(folder, 100), ["103", "96", "--tokenizer"]),
}


def refused(source: object, tmp_path: Path, words: list[str], **options: Any) -> None:
    """One sentence with these words, exit code 2, and no folder, hidden or not."""
    before = set(tmp_path.iterdir())
    with pytest.raises(CdaError) as caught:
        imported(source, tmp_path / "run", **options)
    assert caught.value.exit_code == 2
    said = str(caught.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said
    assert set(tmp_path.iterdir()) <= before | {tmp_path / "cache"}, "something half-written stays"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    refused(folder, tmp_path, words)


def shard_of(folder: Path) -> Path:
    """One of the files of the weights."""
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = shard_of(folder)
    shard.unlink()
    refused(folder, tmp_path, [shard.name, "download"])


def test_an_index_cannot_lead_out_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = shard_of(folder)
    shard.rename(tmp_path / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../elsewhere.safetensors"))
    refused(folder, tmp_path, ["../elsewhere.safetensors"])


@pytest.mark.parametrize(
    ("source", "words"),
    [("nowhere", ["nowhere"]), ("empty", ["config.json", "GGUF"]), ("empty/file", ["folder"])],
)
def test_what_is_no_model_is_refused(source: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    if source == "empty/file":
        (tmp_path / source).write_bytes(b"")
    refused(tmp_path / source, tmp_path, words)


def test_a_context_longer_than_that_of_the_model_is_refused(whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path, ["--seq-len 64"], seq_len=65)


def test_a_setting_that_no_tensor_fills_is_refused(whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path, ["to_gate.weight"], sets=["model.output_gate=true"])
    refused(whole, tmp_path, ["shape"], sets=["model.ff_width=65"])
    refused(whole, tmp_path, ["bytes are 256", "--tokenizer"], tokenizer="bytes")


def test_a_folder_with_content_is_not_touched(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(whole, tmp_path, ["is not empty", "a new folder"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "run" / "notes.txt").unlink()
    imported(whole, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").is_file(), "an empty folder is no obstacle"


def test_a_write_that_fails_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CdaError, match="could not write"):
        imported(whole, tmp_path / "file" / "run")
