"""A folder that `cda export` wrote gives, in transformers, what the checkpoint gives here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import cda_cli.interchange.hf  # noqa: F401 - makes the model known to transformers
from cda_cli.errors import ConfigError
from cda_cli.generation import SamplingSettings, generate
from cda_cli.interchange.export import export
from cda_cli.restore import Restored, restore
from tests.interchange.checkpoints import save_checkpoint

GREEDY = SamplingSettings(temperature=0)
CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned k, gate": {"attention": "coordinate-descent", "learned_k": True, "output_gate": True, "null_kv": 2},
    "annealed ε": {"attention": "coordinate-descent", "eps_anneal_start": 2.0, "null_kv": 1, "position": "rotary"},
    "annealed ε, iterative": {"attention": "coordinate-descent", "solver": "iterative", "eps_anneal_start": 2.0},
    "modern": {
        "attention": "tempered-softmax", "position": "rotary", "norm": "rmsnorm", "qk_norm": True, "ff": "swiglu",
        "tied_embeddings": True, "null_kv": 1, "eps_anneal_start": 1.0,
    },
    "softmax, tied": {
        "attention": "softmax", "tied_embeddings": True, "position": "nape", "length_scaling": "log-n",
        "heads": 4, "dim_head": 8,
    },
}  # fmt: skip
each_model = pytest.mark.parametrize("settings", MODELS.values(), ids=list(MODELS))


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cda_cli.interchange.hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install --upgrade transformers"):
        importlib.import_module("cda_cli.interchange.hf")


def written(tmp_path: Path, *, averaged: bool = False, **settings: Any) -> tuple[Restored, Path]:
    """Exports a checkpoint with these settings, and returns what is restored from it, and the folder."""
    checkpoint = save_checkpoint(tmp_path / "run", averaged=averaged, **settings)
    folder = tmp_path / "exported"
    export(checkpoint, folder, "hf", name="exported", ema=averaged)
    return restore(checkpoint, CPU, ema=averaged), folder


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(250, (batch, length), generator=torch.Generator().manual_seed(5))


def ours(restored: Restored, prompt: list[int], count: int) -> list[int]:
    """What `cda sample --temperature 0` takes, without its end at a separator."""
    return list(generate(restored.model, prompt, count, GREEDY, seed=0))


@each_model
def test_the_logits_are_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    """In float32. With weights in bfloat16 they differ by some roundings of 2⁻⁹ each."""
    restored, folder = written(tmp_path, **settings)
    batch = some_tokens(2, 24)
    with torch.no_grad():
        expected = restored.model(batch)
        assert torch.equal(loaded(folder)(batch).logits, expected)
        low = loaded(folder, dtype=torch.bfloat16)(batch).logits
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() < 2**-6 * expected.norm()


def test_the_averaged_weights_are_those_of_the_average(tmp_path: Path) -> None:
    restored, folder = written(tmp_path, averaged=True)
    batch = some_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(loaded(folder)(batch).logits, restored.model(batch))


@each_model
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_is_greedy_sampling_here(settings: dict[str, Any], cache: str | None, tmp_path: Path) -> None:
    """With a cache of either kind, without one, and for several prompts of unequal length, padded in front."""
    restored, folder = written(tmp_path, **settings)
    model, prompts = loaded(folder), [[5, 6, 7, 8, 9, 10], [40, 41], [99]]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 255}
    if cache:
        options["cache_implementation"] = cache
    for prompt in prompts[:2]:
        expected = prompt + ours(restored, prompt, 8)
        assert model.generate(torch.tensor([prompt]), **options)[0].tolist() == expected
        if not cache:
            assert model.generate(torch.tensor([prompt]), use_cache=False, **options)[0].tolist() == expected
    padded = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(padded, attention_mask=mask, **options)[:, 6:].tolist()
    assert found == [ours(restored, prompt, 8) for prompt in prompts]


def test_the_repetition_penalty_is_that_of_transformers(tmp_path: Path) -> None:
    restored, folder = written(tmp_path, attention="coordinate-descent")
    prompt, how = [40, 41, 42, 41], SamplingSettings(0.0, repetition_penalty=1.3)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 255}
    found = loaded(folder).generate(torch.tensor([prompt]), repetition_penalty=1.3, **options)[0].tolist()
    assert found == prompt + list(generate(restored.model, prompt, 12, how, seed=0))
    assert found != loaded(folder).generate(torch.tensor([prompt]), **options)[0].tolist()


def test_it_is_trained_on(tmp_path: Path) -> None:
    """The loss skips −100 and is that of the next token; gradients reach every weight, recomputed ones the same."""
    restored, folder = written(tmp_path, attention="coordinate-descent", learned_k=True, null_kv=1)
    model, batch = loaded(folder), some_tokens(2, 12)
    labels = batch.clone()
    labels[1, 5:] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = torch.nn.functional.cross_entropy(
        restored.model(batch).flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    loss = model(batch, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    assert all(bool(gradient.any()) for gradient in gradients if gradient.numel() > 12)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(batch, labels=labels).loss.backward()
    assert all(torch.equal(weight.grad, before) for weight, before in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("name", ["learned k, gate", "softmax, tied"])
def test_a_token_after_a_cache_has_the_gradient_of_the_whole(name: str, tmp_path: Path) -> None:
    model = loaded(written(tmp_path, **MODELS[name])[1]).double()
    tokens, weights = some_tokens(2, 5), [block.attention.to_qkv.weight for block in model.model.each_block()]
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    logits = (model(tokens).logits[:, -1:], model(tokens[:, -1:], past_key_values=cache).logits)
    expected, found = (torch.autograd.grad(each.square().sum(), weights) for each in logits)
    torch.testing.assert_close(found, expected)


def test_saved_by_transformers_it_loads_again(tmp_path: Path) -> None:
    """Also what is only in the configuration: the ε of the step, and that weights are tied."""
    _, folder = written(tmp_path, **MODELS["modern"])
    model, batch = loaded(folder), some_tokens(1, 10)
    with torch.no_grad():
        model.model.blocks[0].feed_forward.proj_in.weight += 0.1
        model.save_pretrained(tmp_path / "again")
        again = loaded(tmp_path / "again")
        assert torch.equal(again(batch).logits, model(batch).logits)
    assert again.model.to_logits.weight is again.model.token_embedding.weight
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert before.items() <= after.items()
    assert (tmp_path / "again/modeling_cda.py").read_bytes() == (folder / "modeling_cda.py").read_bytes()


def test_it_loads_where_nothing_was_imported(tmp_path: Path) -> None:
    """In a process of its own, with trust_remote_code, by the module in the folder."""
    restored, folder = written(tmp_path, **MODELS["annealed ε"])
    script = (
        "import sys, torch, transformers as t; t.logging.set_verbosity_error(); "
        f"m = t.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True); "
        f"k = t.AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True); "
        "print(m(torch.tensor([k('Hé')['input_ids']])).logits.double().sum().item())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = restored.model(torch.tensor([list("Hé".encode())])).double().sum().item()
    assert float(done.stdout) == expected


def test_a_mask_with_holes_and_positions_of_ones_own_are_refused(tmp_path: Path) -> None:
    """Taken silently, either would give wrong logits."""
    model = loaded(written(tmp_path)[1])
    with pytest.raises(ValueError, match="hides tokens within a row"):
        model(some_tokens(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="takes no position_ids"):
        model(some_tokens(1, 4), position_ids=torch.arange(4)[None])
