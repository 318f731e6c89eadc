"""A softmax model that is one of a family of transformers is exported as that, without code of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cda_cli.interchange.export import export
from cda_cli.restore import restore
from tests.interchange.checkpoints import save_checkpoint
from tests.interchange.models import MODELS, imported, logits, randomised, restored, save

BATCH = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(3))
LLAMA: dict[str, Any] = {
    "position": "rotary", "norm": "rmsnorm", "ff": "swiglu", "ff_bias": False, "logits_bias": False, "heads": 4,
    "kv_heads": 2, "dim": 16, "attention": "softmax",
}  # fmt: skip

GPT2: dict[str, Any] = {
    "position": "learned", "norm": "layernorm", "ff": "gelu-tanh", "attn_bias": "all", "logits_bias": False, "heads": 4,
    "dim": 16, "attention": "softmax",
}  # fmt: skip


def exported(checkpoint: Path, folder: Path) -> Path:
    export(checkpoint, folder, "hf", name=folder.name)
    return folder


@pytest.mark.parametrize("name", sorted(MODELS))
def test_in_and_out_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Every tensor has the same bits, and so have the logits: transformers runs its own code on both.

    A Mistral whose window holds its whole context is a Llama.
    """
    family, make = MODELS[name]
    family = {"mistral": "llama"}.get(family, family)
    torch.manual_seed(0)
    source = randomised(make())
    imported(save(source, tmp_path / "source"), tmp_path / "run")
    folder = exported(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    separator = restored(tmp_path / "run").tokenizer.separator
    assert model.config.eos_token_id == separator, "a tool that reads config.json alone ends a text elsewhere"
    assert torch.equal(logits(model, BATCH), logits(source, BATCH))
    assert not (folder / "modeling_cda.py").exists(), "a family of transformers needs no code of ours"


def test_the_token_that_begins_a_prompt_goes_along(tmp_path: Path) -> None:
    source = save(randomised(MODELS["llama"][1]()), tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    imported(source, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(tmp_path / "run", tmp_path / "out"))
    ours = restored(tmp_path / "run").tokenizer
    assert ours.bos == 93
    assert tokenizer("w1 w2")["input_ids"] == [93, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (93, ours.separator)


def test_a_model_trained_here_is_a_llama(tmp_path: Path) -> None:
    """Its logits are ours, but for rounding."""
    checkpoint = save_checkpoint(tmp_path / "run", **LLAMA)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(checkpoint, tmp_path / "out")).eval()
    assert isinstance(model, transformers.LlamaForCausalLM)
    expected = logits(restore(checkpoint, torch.device("cpu")).model, BATCH)
    torch.testing.assert_close(logits(model, BATCH), expected, rtol=0, atol=2e-4)


def test_a_model_trained_here_is_a_gpt2(tmp_path: Path) -> None:
    folder = exported(save_checkpoint(tmp_path / "run", **GPT2), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (LLAMA, {"null_kv": 1}),
        (LLAMA, {"attention": "tempered-softmax"}),
        (LLAMA, {"output_gate": True}),
        (LLAMA, {"ff": "relu2"}),
        (GPT2, {"kv_heads": 2}),
        (GPT2, {"dim_head": 8}),
    ],
)
def test_what_no_family_can_say_keeps_our_own_code(
    family: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    folder = exported(save_checkpoint(tmp_path / "run", **family | change), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "cda"


def test_the_card_names_the_source_and_its_licence(tmp_path: Path) -> None:
    """It claims no training and no text, and tells nothing of the folders of this machine."""
    source = save(randomised(MODELS["llama"][1]()), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    imported(source, tmp_path / "run")
    card = (exported(tmp_path / "run", tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0\n" in card
    assert "| imported from | source |" in card
    assert "The run has trained on no text." in card
    assert str(tmp_path) not in card
