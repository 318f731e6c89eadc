"""Weights of the published package, saved as safetensors, make a run with its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import coordinate_descent_attention as package
import pytest
import torch
from safetensors.torch import save_file

from cda_cli.errors import CheckpointError
from tests.interchange.models import imported, logits, randomised, restored

SIZES: dict[str, Any] = {"num_tokens": 256, "dim": 20, "seq_len": 17, "depth": 2, "dim_head": 8, "heads": 3}
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"attn_null_kv": 2, "ff_mult": 2.7},
    {"learned_sparsity_k": True},
    {"attn_use_coor_descent": True, "attn_coor_descent_sparsity_k": 5, "coor_descent_iters": 25, "attn_null_kv": 1},
    {"attn_use_coor_descent": True, "coor_descent_eps": 0.5},
]
BATCH = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))


def save(arguments: dict[str, Any], file: Path) -> Any:
    model = randomised(package.Transformer(**SIZES | arguments))
    stated = {key: value for key, value in arguments.items() if "null" not in key and "mult" not in key}
    save_file(model.state_dict(), file, {"arguments": json.dumps(stated)} if stated else None)
    return model


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ",".join(arguments) or "softmax")
def test_the_logits_are_those_of_the_package(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = save(arguments, tmp_path / "weights.safetensors")
    imported(f"published:{tmp_path / 'weights.safetensors'}", tmp_path / "run")
    run = restored(tmp_path / "run")
    assert run.tokenizer.name == "bytes"
    torch.testing.assert_close(logits(run.model, BATCH), logits(model, BATCH), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tensors", "arguments", "words"),
    [
        ({"weight": torch.ones(2)}, "{}", "state dict"),
        (None, "{", "damaged"),
        (None, '{"attn_use_coor_descent": "yes"}', "state dict"),
    ],
)
def test_another_file_is_refused(tensors: Any, arguments: str, words: str, tmp_path: Path) -> None:
    model = package.Transformer(**SIZES)
    save_file(tensors or model.state_dict(), tmp_path / "file.safetensors", {"arguments": arguments})
    with pytest.raises(CheckpointError, match=words):
        imported(f"published:{tmp_path / 'file.safetensors'}", tmp_path / "run")
    assert not (tmp_path / "run").exists()
