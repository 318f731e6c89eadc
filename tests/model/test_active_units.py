"""A feed-forward that reads the weights of units that are not 0 alone computes what the whole one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cda_cli.generation import Generation, Request, SamplingSettings
from cda_cli.model import Transformer
from cda_cli.model.activations import ACTIVATIONS
from cda_cli.model.active_units import MOST_ROWS, ActiveBlocks, ActiveUnits, reading_active_units, weights_read
from cda_cli.model.feed_forward import FeedForward
from cda_cli.ops import Backend
from tests.devices import DEVICES
from tests.model.cases import build, tiny, tokens

SPARSE = sorted(name for name, activation in ACTIVATIONS.items() if activation.has_zeros)


def layer_of(name: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> FeedForward:
    """96 units, of which few are not 0, or 24 blocks of 4."""
    torch.manual_seed(0)
    return FeedForward(tiny(ff=name, ff_mult=8.0, ff_k=4.0, ff_eps=0.02, ff_bias=bias), 0, "auto").to(dtype)


def token(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def with_few_active(layer: FeedForward) -> FeedForward:
    """Shifts what decides on the units, as training does, so that about a tenth of them is above 0."""
    decides = layer.proj_in if layer.proj_gate is None else layer.proj_gate
    if decides.bias is not None and layer.activation.block_size is None:
        decides.bias -= 0.7
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SPARSE)
@torch.inference_mode()
def test_a_token_gets_what_the_whole_layer_gives(name: str, bias: bool) -> None:
    """Tokens of any size, with all units at 0 too, by as many threads as there are."""
    layer = with_few_active(layer_of(name, bias=bias))
    active, threads = ActiveUnits(layer), torch.get_num_threads()
    try:
        for seed, (scale, torch_threads) in enumerate([(1.0, 1), (1.0, 3), (1e-3, 1), (30.0, 3)]):
            torch.set_num_threads(torch_threads)
            x = token(seed, scale)
            torch.testing.assert_close(active(x), layer(x), rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(threads)
    several = torch.cat([token(seed) for seed in range(3)], 1)
    assert torch.equal(active(several), layer(several))
    assert active.steps == 4


@pytest.mark.parametrize("name", SPARSE)
@torch.inference_mode()
def test_the_weights_of_units_that_are_zero_are_not_read(name: str) -> None:
    """They are NaN here: those of the down projection, and with a gate or a router those of the up projection."""
    layer, x = with_few_active(layer_of(name)), token(0)
    factors = layer.factors(x)
    hidden = layer.proj_in(x)
    expected, activations = layer(x), layer.activation(hidden, factors).flatten()
    unread = activations == 0
    assert 0 < (~unread).sum() <= 24
    layer.proj_out.weight[:, unread] = torch.nan
    left_out = torch.zeros_like(unread)
    if factors is not None:
        size = layer.activation.block_size or 1
        left_out = unread.unflatten(0, (-1, size)).all(1).repeat_interleave(size)
        layer.proj_in.weight[left_out] = torch.nan
    active = ActiveUnits(layer)
    torch.testing.assert_close(active(x), expected, rtol=1e-12, atol=1e-12)
    read = 2 * 96 - int(unread.sum()) - int(left_out.sum())
    assert active.rows_read == read + (factors.numel() if factors is not None else 0)


@torch.inference_mode()
def test_many_active_units_are_read_as_a_whole() -> None:
    layer = layer_of("relu2")
    layer.proj_in.bias += 1.0
    active = ActiveUnits(layer)
    assert torch.equal(active(token(0)), layer(token(0)))
    assert active.rows_read == 2 * 96


@pytest.mark.parametrize("name", ["relu2", "reglu", "blocks"])
@torch.inference_mode()
def test_products_in_bf16_are_those_of_the_whole_layer(name: str) -> None:
    """The sum of rows, the sum of bags and the bias are rounded once each, to 2⁻⁹ of themselves."""
    layer, x = with_few_active(layer_of(name, torch.bfloat16)), token(0).float()
    active = ActiveUnits(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, whole = active(x), layer(x)
    assert found.dtype == whole.dtype == torch.bfloat16
    torch.testing.assert_close(found, whole, rtol=0, atol=4 * 2**-9 * whole.abs().max().item())
    assert active.rows_read < layer.activation.total_width


@torch.inference_mode()
def test_a_model_shares_its_parameters_and_says_what_it_read() -> None:
    config = tiny(ff="reglu")
    model = build(config)
    for block in model.each_block():
        assert block.feed_forward.proj_gate is not None
        block.feed_forward.proj_gate.bias -= 100
    active = reading_active_units(model)
    assert weights_read(active) is None
    batch = tokens(config, batch=1, length=1)
    torch.testing.assert_close(active(batch), model(batch), rtol=1e-5, atol=1e-6)
    assert weights_read(active) == pytest.approx(1 / 3), "the gate alone is read"
    assert {id(p) for p in active.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["blocks", "hard-topk-blocks", "sigmoid-topk-blocks"])
@torch.inference_mode()
def test_rows_read_the_blocks_that_their_router_selects(name: str, dtype: torch.dtype) -> None:
    """By kernels, for few rows with a token each; all else goes through the whole layer."""
    layer = layer_of(name, dtype).to(DEVICES[-1])
    active, rows = ActiveBlocks(layer), torch.cat([token(seed) for seed in range(3)]).to(DEVICES[-1], dtype)
    factors = layer.factors(rows)
    assert factors is not None
    selected = int((factors != 0).flatten(0, 1).any(0).sum())
    assert 0 < selected < 24
    found, whole = active(rows), layer(rows)
    assert found.dtype == whole.dtype == dtype
    # Errors of 2⁻⁸ in bf16: the whole layer rounds each unit, which counts twice in its square, the square, and its
    # product with λ, and both round the output. `sizes` is rounded as well.
    units, down = layer.activation(layer.proj_in(rows), factors), layer.proj_out
    sizes = units.abs() @ down.weight.abs().T + down.bias.abs()
    bound = {torch.float32: 1e-5, torch.bfloat16: 7 * 2**-8}[dtype] * sizes.double()
    assert ((found.double() - whole.double()).abs() <= bound).all()
    assert (active.steps, active.rows_read) == (1, 24 + 2 * 4 * selected)
    for several in (rows.transpose(0, 1), rows[:1].expand(MOST_ROWS + 1, -1, -1)):
        assert torch.equal(active(several), layer(several))
    assert active.steps == 1


@pytest.mark.parametrize("name", ["blocks", "hard-topk-blocks", "sigmoid-topk-blocks"])
def test_texts_are_those_of_the_whole_layer(name: str) -> None:
    """On a GPU steps are CUDA graphs, of one row, two and four."""

    def texts(backend: Backend, device: str) -> tuple[list[tuple[int, int]], float | None]:
        torch.manual_seed(0)
        config = tiny(ff=name, ff_mult=8.0, ff_k=2.0, ff_eps=0.02, depth=1, attention="softmax", dim_head=16)
        model = Transformer(config, backend).eval()
        torch.nn.init.normal_(model.to_logits.weight, std=0.6)
        model.to(device)
        requests = [Request([1, 2, 3 + seed], 3 + seed, SamplingSettings(0.8), seed) for seed in range(3)]
        generation = Generation(model, requests, batch_size=3)
        return sorted((each.request, each.token) for each in generation), generation.weights_read()

    (expected, whole), (found, share) = texts("torch", "cpu"), texts("triton", DEVICES[-1])
    assert found == expected
    assert whole is None
    assert share is not None
    assert share < 0.9
