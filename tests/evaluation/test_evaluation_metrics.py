"""Loss, perplexity, bits per byte and their errors, against what they mean written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.data import IGNORE, Batch, Tokens, evaluation_batches
from cda_cli.evaluation import Evaluation, bits_per_byte, evaluate
from cda_cli.model import Transformer
from cda_cli.token_losses import token_losses

CPU = torch.device("cpu")
VOCABULARY = 19
LENGTHS = st.tuples(st.integers(2, 50), st.integers(1, 9))


def text(count: int, seed: int = 0) -> Tokens:
    """Random tokens that stand for 0 to 6 bytes each."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, VOCABULARY, count, dtype=np.uint16)
    sizes = generator.integers(0, 7, count, dtype=np.uint16)
    return Tokens(ids, sizes, text_bytes=int(sizes.sum()))


def build(seq_len: int = 9, **changes: object) -> Transformer:
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "seq_len": seq_len, "dim": 8, "depth": 1, "heads": 2, "ff_mult": 2.0}
    model = Transformer(ModelConfig(**settings | changes)).eval()
    nn.init.normal_(model.to_logits.weight, std=1.0)
    return model


def run(model: nn.Module, tokens: Tokens, seq_len: int, batch_size: int) -> Evaluation:
    return evaluate(model, evaluation_batches(tokens, seq_len, batch_size), CPU, torch.float32)


@torch.no_grad()
def direct_losses(model: Transformer, tokens: Tokens, seq_len: int) -> list[list[float]]:
    """Returns the nats of each token but the first, window by window.

    The model sees one window at a time. The last one is full where the text is long enough, and only its new targets
    are counted.
    """
    ids = tokens.ids.astype(np.int64)
    found = []
    for first in range(0, len(ids) - 1, seq_len):
        start = max(0, min(first, len(ids) - 1 - seq_len))
        log_p = model(torch.from_numpy(ids[start : start + seq_len])[None])[0].double().log_softmax(-1)
        targets = range(first + 1, min(first + seq_len, len(ids) - 1) + 1)
        found.append([-log_p[target - start - 1, ids[target]].item() for target in targets])
    return found


@settings(max_examples=60)
@given(lengths=LENGTHS, batch_size=st.integers(1, 7), seed=st.integers(0, 99))
@example(lengths=(11, 7), batch_size=1, seed=8)  # of two windows one has no bytes
def test_the_metrics_are_those_of_a_direct_computation(lengths: tuple[int, int], batch_size: int, seed: int) -> None:
    """Each token once, the last window included, however short its new part is."""
    count, seq_len = lengths
    model, tokens = build(), text(count, seed)
    windows = direct_losses(model, tokens, seq_len)
    losses = [loss for window in windows for loss in window]
    found = run(model, tokens, seq_len, batch_size)
    assert found.tokens == count - 1 == len(losses)
    assert found.windows == len(windows)
    loss = math.fsum(losses) / len(losses)
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    sizes = [int(tokens.sizes[first : first + seq_len].sum()) for first in range(1, count, seq_len)]
    assert found.text_bytes == sum(sizes) == int(tokens.sizes[1:].sum())
    bits = math.fsum(losses) / math.log(2) / sum(sizes) if sum(sizes) else math.inf
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)

    n = len(windows)
    if n == 1 or not sum(sizes):
        assert math.isnan(found.standard_error) is (n == 1)
        assert math.isnan(found.bits_per_byte_error)
        return

    # Cochran, Sampling Techniques, equation 6.13 gives the variance of a ratio of means. Its correction for a finite
    # population is left out.
    def error(ratio: float, each: list[int]) -> float:
        pairs = zip(windows, each, strict=True)
        variance = math.fsum((math.fsum(window) - ratio * size) ** 2 for window, size in pairs) / (n - 1)
        return math.sqrt(variance / n) / (sum(each) / n)

    assert found.standard_error == pytest.approx(error(loss, [*map(len, windows)]), rel=1e-4, abs=1e-6)
    if sum(size > 0 for size in sizes) < 2:
        assert math.isnan(found.bits_per_byte_error), "only one window has bytes"
        return
    expected = error(bits * math.log(2), sizes) / math.log(2)
    assert found.bits_per_byte_error == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(max_examples=25)
@given(lengths=LENGTHS, batch_sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_the_batch_size_does_not_show(lengths: tuple[int, int], batch_sizes: tuple[int, int]) -> None:
    count, seq_len = lengths
    model, tokens = build(), text(count)
    one, other = (run(model, tokens, seq_len, size) for size in batch_sizes)
    assert one._asdict() == pytest.approx(other._asdict(), rel=1e-5, abs=1e-5, nan_ok=True)


def constant(logits: Tensor) -> Transformer:
    """A model with the same logits [V] everywhere."""
    model = build(vocab_size=len(logits))
    nn.init.zeros_(model.to_logits.weight)
    model.to_logits.bias.data.copy_(logits)
    return model


def test_a_uniform_guess_over_bytes_is_eight_bits() -> None:
    ids = text(100).ids
    found = run(constant(torch.zeros(256)), Tokens(ids, np.ones_like(ids), 100), 7, 4)
    assert found.bits_per_byte == pytest.approx(8, abs=1e-5)
    assert found.perplexity == pytest.approx(256, rel=1e-5)
    assert found.standard_error == pytest.approx(0, abs=1e-6)
    assert bits_per_byte(math.log(256), 2) == pytest.approx(4)


def test_a_model_that_is_utterly_wrong_has_metrics_too() -> None:
    """e to the loss would be more than a float holds."""
    logits = torch.full((VOCABULARY + 1,), -5000.0)
    logits[-1] = 5000.0
    found = run(constant(logits), text(50), 7, 4)
    assert found.loss == pytest.approx(10_000)
    assert math.isfinite(found.perplexity)


def test_the_error_covers_the_loss_of_the_text_as_often_as_it_says() -> None:
    """Each estimate takes 30 windows of a text. About 68 % of the estimates lie within one standard error."""
    generator = torch.Generator().manual_seed(0)
    model = build(seq_len=6)
    long = text(6 * 2000 + 1)
    truth = run(model, long, 6, 500).loss
    whole = list(evaluation_batches(long, 6, 1))
    within = 0
    for _ in range(200):
        chosen = torch.randperm(len(whole), generator=generator)[:30]
        batch = Batch(*(torch.cat([getattr(whole[i], side) for i in chosen]) for side in vars(whole[0])))
        found = evaluate(model, [batch], CPU, torch.float32)
        within += abs(found.loss - truth) <= found.standard_error
    assert 0.58 <= within / 200 <= 0.78, f"{within} of 200"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_and_dropout_is_off_meanwhile(training: bool) -> None:
    """Otherwise a run would train on without dropout after its first validation, or be validated with it."""
    model = build(dropout=0.5).train(training)
    expected = run(build(dropout=0.0), text(40), 9, 3)
    assert run(model, text(40), 9, 3).loss == pytest.approx(expected.loss, abs=1e-5)
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_after_an_error(training: bool) -> None:
    model = build().train(training)
    beyond = Batch(*(torch.zeros(1, 10, dtype=torch.int64) for _ in range(2)), torch.zeros(1))
    with pytest.raises(ValueError, match="exceed the context"):
        evaluate(model, [beyond], CPU, torch.float32)
    assert model.training is training


def test_progress_hears_of_every_window() -> None:
    heard: list[int] = []
    found = evaluate(build(), evaluation_batches(text(40), 9, 2), CPU, torch.float32, heard.append)
    assert heard == [2, 2, 1]
    assert sum(heard) == found.windows


def test_the_loss_of_a_token_that_is_not_counted_is_0() -> None:
    batch = next(evaluation_batches(text(12), 9, 2))
    losses = token_losses(build(), batch, CPU, torch.float32)
    assert losses.shape == batch.targets.shape
    assert losses.dtype == torch.float32
    assert torch.equal(losses == 0, batch.targets == IGNORE)
    assert losses.requires_grad, "training takes its gradient from here"


def test_no_graph_is_kept() -> None:
    """Memory would grow with the text."""
    model = build()
    run(model, text(40), 9, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    grads: list[bool] = []
    model.norm.register_forward_hook(lambda module, args, out: grads.append(out.requires_grad))
    run(model, text(40), 9, 3)
    assert grads
    assert not any(grads)


def test_bf16_products_are_near_float32() -> None:
    model, batches = build(), list(evaluation_batches(text(100), 9, 4))
    exact, rounded = (evaluate(model, batches, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.loss == pytest.approx(exact.loss, rel=4 * 2.0**-8)
    assert rounded.loss != exact.loss, "the dtype that was asked for is not the one that ran"
