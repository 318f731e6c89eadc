"""The weights of a model that is one of the published package, for that package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import coordinate_descent_attention as package
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import cda_cli
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.interchange.export import export
from cda_cli.restore import restore
from tests.interchange.checkpoints import save_checkpoint
from tests.interchange.models import imported, logits, restored

BATCH = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(3))


def exported(checkpoint: Path, folder: Path) -> Path:
    export(checkpoint, folder, "published", name=folder.name)
    return folder


PUBLISHED: dict[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax", "ff_mult": 2.7},
    "sparse": {"attention": "coordinate-descent", "solver": "iterative", "null_kv": 2, "n_iters": 7},
    "learned k": {
        "attention": "coordinate-descent", "solver": "iterative", "learned_k": True, "ff": "coordinate-descent",
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", PUBLISHED.values(), ids=list(PUBLISHED))
def test_the_published_package_loads_its_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    """As the model card says. Back in, they are the run that went out."""
    checkpoint = save_checkpoint(tmp_path / "run", **settings)
    folder = exported(checkpoint, tmp_path / "out")
    model = package.Transformer(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    ours = restore(checkpoint, torch.device("cpu")).model
    if settings["attention"] == "softmax":  # The published operator runs on GPUs alone.
        torch.testing.assert_close(logits(model.eval(), BATCH), logits(ours, BATCH), rtol=0, atol=1e-4)
    imported(f"published:{folder / 'model.safetensors'}", tmp_path / "again")
    for back in (restored(tmp_path / "again").model, cda_cli.load(folder, device="cpu").model):
        torch.testing.assert_close(logits(back, BATCH), logits(ours, BATCH), rtol=0, atol=1e-5)


def test_a_folder_comes_back_with_its_licence(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "run", attention="softmax")
    export(checkpoint, tmp_path / "out", "published", name="out", license="mit")
    origin = imported(tmp_path / "out", tmp_path / "again").origin
    assert (origin["source"], origin["license"]) == (str(tmp_path / "out"), "mit")
    assert list(origin["sha256"]) == ["model.safetensors"]


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """The package knows no tokenizer, so that the folder of a model with 5 tokens is not taken for bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: id for id, letter in enumerate("abcd")}, []))
    checkpoint = save_checkpoint(tmp_path / "run", tokenizer_json=made.to_str(), vocab_size=5, attention="softmax")
    folder = exported(checkpoint, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"5 tokens, and bytes are 256.*--tokenizer"):
        cda_cli.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention": "hard-topk", "tied_embeddings": True}, "attention=hard-topk, tied_embeddings=True"),
        ({"attention": "coordinate-descent"}, "solver=exact"),
        ({"ff": "coordinate-descent", "solver": "iterative", "ff_eps": 0.5, "attention": "coordinate-descent"},
         "ff_eps=0.5, as the ε of attention is 0.3"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_the_published_one_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=words):
        exported(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
