"""A folder that `cda export` wrote comes back: in Python by `cda_cli.load`, and as a run by `cda import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import cda_cli
from cda_cli.data import tokenizer_from_json
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.interchange.export import export
from cda_cli.interchange.hf_files import write_hf
from cda_cli.language_model import LanguageModel
from cda_cli.restore import restore
from tests.commands.helpers import Cda, run_cda
from tests.interchange.checkpoints import save_checkpoint

TEXT = "Größe and ε: bytes."
MODELS: dict[str, dict[str, Any]] = {
    "soft top-k": {"attention": "coordinate-descent", "learned_k": True, "output_gate": True, "null_kv": 2},
    "annealed ε": {"attention": "coordinate-descent", "eps_anneal_start": 2.0, "position": "rotary"},
    "tied": {"attention": "tempered-softmax", "tied_embeddings": True, "norm": "rmsnorm", "ff": "swiglu"},
    "a family of transformers": {
        "attention": "softmax", "position": "rotary", "norm": "rmsnorm", "ff": "swiglu", "ff_bias": False,
        "kv_heads": 1, "logits_bias": False, "qk_norm": False,
    },
}  # fmt: skip
each_model = pytest.mark.parametrize("settings", MODELS.values(), ids=list(MODELS))


@pytest.fixture
def cda() -> Cda:
    return run_cda


def written(tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """A checkpoint with these settings, and the folder that it was exported to."""
    checkpoint, folder = save_checkpoint(tmp_path / "run", **settings), tmp_path / "exported"
    export(checkpoint, folder, "hf", name="exported", license="unknown")
    return checkpoint, folder


def assert_same(one: LanguageModel, other: LanguageModel) -> None:
    torch.testing.assert_close(one.logits(TEXT), other.logits(TEXT), rtol=1e-5, atol=1e-5)
    pair = (TEXT, " One after another.")
    assert one.loglikelihood(pair) == pytest.approx(other.loglikelihood(pair), abs=1e-4)
    assert one.generate("Grö", 20, temperature=0) == other.generate("Grö", 20, temperature=0)


@each_model
def test_python_loads_what_was_exported(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint, folder = written(tmp_path, **settings)
    exported = cda_cli.load(folder, device="cpu")
    assert exported.path == folder
    assert exported.tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert_same(exported, cda_cli.load(checkpoint, device="cpu"))


def test_a_tokenizer_comes_back_with_its_separator(tmp_path: Path) -> None:
    """Its tokenizer.json names no separator, so the model has an id for one, and the exported file a token."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: id for id, letter in enumerate("abcd")}, []))
    checkpoint = save_checkpoint(tmp_path / "run", tokenizer_json=made.to_str(), vocab_size=5)
    export(checkpoint, tmp_path / "exported", "hf", name="exported", license="unknown")
    before, after = (cda_cli.load(path, device="cpu") for path in (checkpoint, tmp_path / "exported"))
    assert after.tokenizer.encode("abcd").tolist() == [0, 1, 2, 3]
    assert after.tokenizer.separator == before.tokenizer.separator == 4
    assert after.tokenizer.vocab_size == 5
    scores = [lm.loglikelihood("abcd", with_separator=True) for lm in (before, after)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_the_tokens_that_begin_and_end_a_document_come_back(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: id for id, letter in enumerate("abcd")}, []))
    made.add_special_tokens(["<s>", "<end>"])
    checkpoint = save_checkpoint(tmp_path / "run", tokenizer_json=made.to_str(), vocab_size=6)
    tokenizer = tokenizer_from_json(made.to_str(), bos="<s>", eos="<end>")
    (tmp_path / "exported").mkdir()
    write_hf(restore(checkpoint, torch.device("cpu"))._replace(tokenizer=tokenizer), tmp_path / "exported")
    exported = cda_cli.load(tmp_path / "exported", device="cpu")
    assert (exported.tokenizer.bos, exported.tokenizer.separator) == (tokenizer.bos, tokenizer.separator) == (4, 5)
    assert (exported.config.data.bos, exported.config.data.eos) == ("<s>", "<end>")
    assert len(exported.logits("abcd")) == 5


@each_model
def test_it_becomes_a_run_again(cda: Cda, tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint, folder = written(tmp_path, **settings)
    done = cda("import", folder, "--out", tmp_path / "again")
    assert done.code == 0, done.err
    assert_same(cda_cli.load(tmp_path / "again", device="cpu"), cda_cli.load(checkpoint, device="cpu"))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    _, folder = written(tmp_path, null_kv=1)
    with pytest.raises(ConfigError, match="holds one model, not a run"):
        cda_cli.load(folder, best=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for damage in ({"settings": None}, {"settings": config["settings"] | {"dim": 0}}, {"attention_eps": "warm"}):
        (folder / "config.json").write_text(json.dumps(config | damage), encoding="utf-8")
        with pytest.raises(CheckpointError, match="export the model again"):
            cda_cli.load(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged, or cut short"):
        cda_cli.load(folder)
