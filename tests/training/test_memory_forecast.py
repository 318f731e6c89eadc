"""The forecast of memory is near the real peak of a step on a CPU, as PyTorch's profiler sees it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cda_cli.config import Config, parse
from cda_cli.data import Batch
from cda_cli.model import Transformer, Truncation, editing
from cda_cli.ops import Choice
from cda_cli.training.accounting.memory_forecast import Forecast, forecast, memory_remark
from cda_cli.training.auxiliary_losses import AuxiliaryLosses
from cda_cli.training.gradients import accumulate_gradients
from cda_cli.training.optimizer import build_optimizer
from tests.devices import DEVICES
from tests.training.helpers import with_settings

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {
    "vocab_size": 257, "seq_len": 128, "dim": 64, "depth": 3, "heads": 2, "position": "rotary", "norm": "rmsnorm",
    "qk_norm": True, "tied_embeddings": True,
}  # fmt: skip


def a_config(model: dict[str, Any] | None = None, checkpointing: bool = False, **optim: Any) -> Config:
    return parse(
        {
            "model": MODEL | (model or {}),
            "optim": {"batch_size": 4} | optim,
            "run": {"activation_checkpointing": checkpointing},
        }
    )


def of(
    config: Config, dtype: torch.dtype = torch.float32, compiled: bool = False, device: torch.device = CPU
) -> Forecast:
    return forecast(config, device, dtype, compiled, False, Choice("torch", "a test"))


def measured(config: Config, dtype: torch.dtype) -> int:
    """Returns the peak of bytes in the forward and backward of a step, with the weights and without the optimizer."""
    torch.manual_seed(0)
    model = Transformer(config.model)
    model.activation_checkpointing = config.run.activation_checkpointing
    AuxiliaryLosses(config.optim, model, config.optim.grad_accum, CPU, {})
    shape = (config.optim.batch_size, config.model.seq_len)
    numbers = torch.randint(257, (config.optim.grad_accum, 2, *shape))
    batches = [Batch(inputs, targets, torch.ones(shape[0])) for inputs, targets in numbers]
    truncation = Truncation(config.optim.truncated_keys) if config.optim.truncated_share else None
    with editing(model, rows=truncation):
        accumulate_gradients(model, batches, CPU, dtype)
        model.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            accumulate_gradients(model, batches, CPU, dtype)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = sum(parameter.nbytes for parameter in model.parameters())
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


MODELS: list[dict[str, Any]] = [
    {"attention": "softmax"},
    {"attention": "softmax", "vocab_size": 5000},
    {"attention": "hard-topk", "null_kv": 1},
    {"attention": "entmax", "ff": "blocks", "ff_k": 2, "ff_block_size": 32},
    {"attention": "softmax", "ff": "swiglu"},
    {"attention": "softmax", "kv_heads": 1, "attn_bias": "all", "nope_layers": [1]},
    {"kv_heads": 1, "normalise": "k", "learned_k": True},
    {"learned_k": True, "null_kv": 1},
    {"ff": "coordinate-descent", "ff_k": 16, "tied_embeddings": False, "norm": "layernorm"},
]
# Each model in both dtypes, and with checkpointing and without; by turns in one of the two pairs that have that.
PAIRS = [[(False, torch.float32), (True, torch.bfloat16)], [(True, torch.float32), (False, torch.bfloat16)]]


@pytest.mark.parametrize(
    ("model", "checkpointing", "dtype"),
    [(model, *pair) for number, model in enumerate(MODELS) for pair in PAIRS[number % 2]],
    ids=str,
)
def test_the_peak_is_the_measured_one(model: dict[str, Any], checkpointing: bool, dtype: torch.dtype) -> None:
    """It is within 15 %. With a large vocabulary the peak is at the loss, and otherwise in the last block."""
    config = a_config(model, checkpointing)
    found = of(config, dtype)
    assert found.peak - found.optimizer == pytest.approx(measured(config, dtype), rel=0.15)


def test_accumulated_gradients_are_there_in_the_second_forward() -> None:
    """With large weights and small activations they make a fifth of the peak."""
    config = a_config({"dim": 256, "seq_len": 32}, batch_size=2, grad_accum=3)
    found, alone = (
        of(config),
        of(config.model_copy(update={"optim": config.optim.model_copy(update={"grad_accum": 1})})),
    )
    assert found.peak > 1.1 * alone.peak
    assert found.peak - found.optimizer == pytest.approx(measured(config, torch.float32), rel=0.15)


@pytest.mark.parametrize("optim", [{"truncated_share": 0.5}, {"support_target": 8.0, "ff_l1": 1e-3}], ids=str)
def test_truncated_steps_and_auxiliary_losses_take_more(optim: dict[str, Any]) -> None:
    config, plain = a_config({"attention": "tempered-softmax"}, **optim), a_config({"attention": "tempered-softmax"})
    found = of(config)
    assert found.peak > 1.05 * of(plain).peak
    assert found.peak - found.optimizer == pytest.approx(measured(config, torch.float32), rel=0.15)


def test_graphs_of_both_kinds_of_steps_keep_their_gradients() -> None:
    every, half = (
        forecast(a_config(truncated_share=share), CPU, torch.float32, False, True, Choice("torch", "a test"))
        for share in (1.0, 0.5)
    )
    assert half.gradients == 2 * every.gradients
    assert half.peak - every.peak == every.gradients


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_stays_is_what_is_allocated(name: str) -> None:
    config = a_config(optimizer=name, ema_decay=0.9)
    model = Transformer(config.model)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parts = optimizer.parts.values() if name == "muon" else [optimizer]
    tensors = [tensor for part in parts for state in part.state.values() for tensor in state.values()]
    found = of(config)
    assert found.weights == found.gradients == found.average == sum(p.nbytes for p in model.parameters())
    assert found.optimizer == sum(tensor.nbytes for tensor in tensors if tensor.ndim)


@functools.cache
def compiled(attention: str, backend: str, device: str, checkpointing: bool) -> Forecast:
    """The forecast of five blocks in bf16. Two tests read the same one, because it takes seconds."""
    config = a_config({"attention": attention, "depth": 5}, checkpointing)
    return of(with_settings(config, {"run.backend": backend}), torch.bfloat16, True, torch.device(device))


def test_a_compiled_model_keeps_less_and_as_much_for_each_block() -> None:
    """The forecast compiles a model of one block and one of two, and must add the three others."""
    attention = "coordinate-descent"
    found = compiled(attention, "triton", DEVICES[-1], False)
    rows, width = 4 * 128, 64
    # At least q, k, v, the output of attention, both sides of the activation, and the stream, each for the backward.
    assert found.activations > 5 * rows * width * (4 * 2 + 2 * 4 * 2 + 4)
    eager = of(a_config({"attention": attention, "depth": 5}), torch.bfloat16)
    assert found.activations < 0.8 * eager.activations
    assert found.logits == rows * 257 * 2, "the logits in bf16, and none of them in float32"


def test_a_compiled_model_keeps_the_logits_of_its_padded_vocabulary() -> None:
    rows, model = 4 * 128, {"attention": "softmax", "depth": 1}
    padded, whole = (of(a_config({**model, "vocab_size": V}), torch.bfloat16, compiled=True) for V in (4999, 5056))
    assert padded.logits == whole.logits == rows * 5056 * 2
    assert padded.activations == pytest.approx(whole.activations, rel=0.05)
    assert padded.weights < whole.weights


def test_a_forecast_allocates_nothing() -> None:
    """A forecast is made where the run may not fit: this one would take terabytes."""
    found = of(parse({"model": MODEL | {"dim": 2**16, "depth": 2, "heads": 512}, "optim": {"batch_size": 2**10}}))
    assert found.peak > 2**40


def test_checkpointing_is_seen_compiled_too() -> None:
    """Whatever the gradient of an operator is, its results are computed again like all others within a block."""
    device = DEVICES[-1]  # the interpreter, in which kernels run on a CPU, is off where there is a GPU
    plain, less = (compiled("coordinate-descent", "triton", device, on) for on in (False, True))
    assert less.activations < plain.activations / 3
    assert less.peak < plain.peak


def test_too_little_memory_is_said_with_the_remedy() -> None:
    said = memory_remark(3 * 2**30, 2**30)
    assert said is not None
    assert "about 3.0 GiB of memory, and 1.0 GiB are free" in said
    assert "--grad-accum" in said
    assert memory_remark(2**30, 2**30) is None
    assert memory_remark(2**60, None) is None, "unknown is no reason to warn"
