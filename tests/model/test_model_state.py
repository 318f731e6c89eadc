"""The tensors that a checkpoint should hold, those that are saved, and those that are loaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from cda_cli.config import ModelConfig
from cda_cli.model import Transformer, expected_tensors, load_state_tensors, state_tensors
from tests.model.cases import build, cases, name, tiny, tokens

every_case = pytest.mark.parametrize("config", cases(), ids=name)


@every_case
def test_what_is_expected_is_what_is_saved(config: ModelConfig) -> None:
    """Otherwise a good checkpoint is refused, or one that does not fit is loaded."""
    saved = state_tensors(build(config))
    assert expected_tensors(config) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in saved.items()}


@every_case
def test_a_checkpoint_brings_the_model_back(config: ModelConfig) -> None:
    """The tensors go through the bytes of a file, which refuses a tensor that is in it twice."""
    model, other = build(config), build(config, seed=9)
    load_state_tensors(other, load(save(state_tensors(model))))
    with torch.no_grad():
        assert torch.equal(other(tokens(config)), model(tokens(config)))


@every_case
def test_every_parameter_is_saved(config: ModelConfig) -> None:
    """A parameter outside the checkpoint starts anew with each resumption. Parameters list a shared tensor once."""
    model = build(config)
    saved = {tensor.data_ptr() for tensor in state_tensors(model).values() if tensor.numel()}
    assert saved == {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    assert sum(tensor.numel() for tensor in state_tensors(model).values()) == model.parameter_count()


def test_tied_embeddings_are_saved_once_and_stay_tied() -> None:
    model, other = build(config := tiny(tied_embeddings=True)), build(config, seed=9)
    tensors = {key: tensor.clone() for key, tensor in state_tensors(model).items()}
    given = dict(tensors)
    assert "token_embedding.weight" in tensors
    assert "to_logits.weight" not in tensors
    load_state_tensors(other, tensors)
    assert tensors == given, "the caller's tensors were changed"
    assert other.to_logits.weight is other.token_embedding.weight
    with torch.no_grad():
        other.token_embedding.weight += 1.0
    assert torch.equal(other.to_logits.weight, tensors["token_embedding.weight"] + 1.0)
    assert torch.equal(model.token_embedding.weight, tensors["token_embedding.weight"]), "the two models share weights"


def test_a_seed_gives_the_weights_and_names_that_it_always_gave() -> None:
    """Runs are made again from their seed, and old checkpoints have these names. A new setting must draw nothing."""
    config = tiny(learned_k=True, null_kv=1)
    torch.manual_seed(0)
    expected = {
        "token_embedding.weight": nn.Embedding(23, 12).weight,
        "position_embedding.weight": nn.Embedding(11, 12).weight,
    }
    for block in ("blocks.0", "blocks.1"):
        expected[f"{block}.attention.to_qkv.weight"] = nn.Linear(12, 36, bias=False).weight
        expected[f"{block}.attention.to_out.weight"] = nn.Linear(12, 12, bias=False).weight
        expected[f"{block}.attention.null_kv"] = nn.Parameter(torch.randn(2, 3, 1, 4))
        expected |= _named(f"{block}.attention.to_learned_k", nn.Linear(12, 3))
        expected[f"{block}.attention.to_learned_k.bias"] = nn.Parameter(torch.full((3,), -0.5))
        expected |= _named(f"{block}.feed_forward.proj_in", nn.Linear(12, 24))
        expected |= _named(f"{block}.feed_forward.proj_out", nn.Linear(24, 12))
        for norm in ("attention_norm", "feed_forward_norm"):
            expected |= _named(f"{block}.{norm}", nn.LayerNorm(12))
    expected |= _named("to_logits", nn.Linear(12, 23)) | _named("norm", nn.LayerNorm(12))
    after = torch.get_rng_state()
    found = state_tensors(build(config))
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), f"{key} starts with other numbers"
    assert torch.equal(torch.get_rng_state(), after), "the model draws more or less than it did"


def _named(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}


@pytest.mark.parametrize("null_kv", [0, 3])
def test_null_keys_are_kept_even_where_there_are_none(null_kv: int) -> None:
    """The state dict of the published model has them in any case."""
    config = tiny(null_kv=null_kv)
    shape = (2, config.heads, null_kv, config.head_width)
    assert expected_tensors(config)["blocks.1.attention.null_kv"] == (shape, torch.float32)
    assert state_tensors(build(config))["blocks.1.attention.null_kv"].shape == shape


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_that_are_missing_or_too_many_are_not_passed_over(tied: bool) -> None:
    model = build(tiny(tied_embeddings=tied))
    tensors = state_tensors(model)
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        load_state_tensors(model, {key: tensor for key, tensor in tensors.items() if key != "norm.bias"})
    with pytest.raises(RuntimeError, match="surplus"):
        load_state_tensors(model, tensors | {"surplus": torch.zeros(1)})


def test_what_is_expected_of_a_model_too_large_for_any_machine_is_known() -> None:
    """Nothing is allocated: a checkpoint is checked before there is a model."""
    config = ModelConfig(vocab_size=10**6, dim=2**16, depth=3, heads=512, position="rotary", ff="coordinate-descent")
    shape, dtype = expected_tensors(config)["blocks.2.feed_forward.proj_in.weight"]
    assert shape == (2**18, 2**16)
    assert dtype == torch.float32


@pytest.mark.parametrize("depth", [1, 8])
def test_the_first_loss_is_that_of_a_uniform_guess(depth: int) -> None:
    """With tied embeddings of an ordinary size the first logits would be far too large."""
    torch.manual_seed(0)
    config = tiny(tied_embeddings=True, depth=depth, dim=96, vocab_size=256, position="rotary")
    with torch.no_grad():
        probabilities = Transformer(config)(tokens(config)).softmax(-1)
    assert probabilities.max() < 4 / 256
