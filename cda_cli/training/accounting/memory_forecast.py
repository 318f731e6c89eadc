"""Forecasts the memory that training takes. It allocates nothing, so it also works for a run that would not fit.

The model runs forward and backward on fake tensors (shapes without memory). The forecast counts what autograd keeps:

- For an uncompiled model it follows every tensor from its allocation to its end, which gives the peak itself.
- For a compiled model PyTorch's own partitioner decides what is kept and what is computed again, with one block and
  with two. Each further block keeps as much as the second. Within fused code there are no intermediate results.

Fake tensors show neither the tensors within an operator nor the workspaces of libraries. Both are estimated.
To compile the same code for several models, the forecast makes torch.compile forget what it has compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cda_cli.config import Config, ModelConfig
from cda_cli.model import (
    Transformer,
    Truncation,
    attention_rule,
    feed_forward_activation,
    model_of_shapes,
    padded_vocabulary,
)
from cda_cli.ops import Choice
from cda_cli.runtime import autocast
from cda_cli.training.auxiliary_losses import AuxiliaryLosses

MIB = 2**20


class Forecast(NamedTuple):
    """The most bytes that each part takes. `peak` is less than their sum if they do not all exist at one time."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int  # kept for the backward, without those of `logits`
    logits: int  # those of the last layer, and what the loss keeps
    workspaces: int
    peak: int


class _SavedBytes(NamedTuple):
    """Bytes that autograd keeps for the backward."""

    activations: int
    logits: int


def forecast(
    config: Config, device: torch.device, dtype: torch.dtype, compiled: bool, captured: bool, choice: Choice
) -> Forecast:
    """Forecasts the memory of a training step with `config`, whose layers run on the backend of `choice`.

    `compiled` and `captured` say whether the step is compiled, and whether CUDA graphs hold it.
    """
    model, optim = config.model, config.optim
    weights = 4 * _parameters(model)
    matrices = 4 * _parameters(model, lambda name, p: p.ndim == 2 and name.startswith("blocks."))
    optimizer = 2 * weights - (matrices if optim.optimizer == "muon" else 0)  # Muon keeps one tensor, AdamW two
    average = weights if optim.ema_decay else 0
    accumulated = weights if optim.grad_accum > 1 else 0
    # CUDA graphs of truncated steps and those of others each keep gradients of their own.
    graphs = 2 if captured and 0 < optim.truncated_share < 1 else 1
    workspaces, scratch = _workspaces(device, captured), _scratch(config, device, choice)
    if compiled:
        kept = _saved_compiled(config, device, dtype)
        at_loss = weights + accumulated + sum(kept) + _temporaries(config, device, dtype, scratch)
        at_end = 2 * weights + accumulated  # all gradients exist at once before they are added
    else:
        kept = _saved(config, device, dtype)
        at_loss, at_end = _traced_peak(config, device, dtype, scratch), 2 * weights
    return Forecast(
        weights=weights,
        gradients=graphs * weights,
        optimizer=optimizer,
        average=average,
        activations=kept.activations,
        logits=kept.logits,
        workspaces=workspaces,
        # The peak is either at the loss, or at the end of a step, when all gradients exist and nothing else does.
        peak=max(at_loss, at_end) + (graphs - 1) * weights + optimizer + average + workspaces,
    )


def memory_remark(peak: int, available: int | None) -> str | None:
    """Returns a sentence if a step on a CPU needs more memory than is free, and None if it fits."""
    if available is None or peak <= available:
        return None
    return (
        f"a step needs about {peak / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are free; use a smaller "
        "--batch-size with a larger --grad-accum, or a smaller --seq-len"
    )


def is_small(config: Config) -> bool:
    """Whether a step needs less than about 2 GiB. It then fits without a forecast, which takes seconds."""
    model = config.model
    rows = config.optim.batch_size * model.seq_len
    return rows * (model.depth * (model.dim + model.ff_units) + model.vocab_size) < 2**23


def _traced_peak(config: Config, device: torch.device, dtype: torch.dtype, scratch: dict[str, int]) -> int:
    """Returns the peak of forward and backward, uncompiled.

    If gradients accumulate it follows two batches, because the second one meets the gradients of the first.
    """
    with FakeTensorMode(), _MemoryTrace(scratch) as trace:
        model = _model(config, device)
        for _ in range(min(2, config.optim.grad_accum)):
            # No hook looks at the saved tensors: it would let them live longer.
            _loss(model, config, device, dtype).backward()
        return trace.peak


def _saved_compiled(config: Config, device: torch.device, dtype: torch.dtype) -> _SavedBytes:
    one, further = _saved(config, device, dtype, 1), config.model.depth - 1
    if not further:
        return one
    two = _saved(config, device, dtype, 2)
    return _SavedBytes(one.activations + further * (two.activations - one.activations), one.logits)


def _saved(config: Config, device: torch.device, dtype: torch.dtype, compiled_depth: int | None = None) -> _SavedBytes:
    """Counts what autograd keeps of a batch besides the weights, each storage once.

    With `compiled_depth` it counts what autograd would keep of a compiled model with so many blocks.
    """
    if compiled_depth is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"depth": compiled_depth})})
        torch._dynamo.reset()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model = called = _model(config, device)
        if compiled_depth is not None:
            # This backend has Inductor's decompositions and partitioner, without its code generation.
            called = torch.compile(model, backend="aot_eager_decomp_partition")  # type: ignore[assignment]
        loss = _loss(called, config, device, dtype)
    for tensor in [*model.parameters(), *model.buffers()]:
        kept.pop(tensor.untyped_storage()._cdata, None)
    rows = config.optim.batch_size * config.model.seq_len
    vocabulary = config.model.vocab_size if compiled_depth is None else padded_vocabulary(config.model.vocab_size)
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in kept.items()}
    of_logits = [key for key, t in kept.items() if t.shape[-1:] == (vocabulary,) and t.numel() == rows * vocabulary]
    del loss
    if compiled_depth is not None:
        torch._dynamo.reset()
    logits = sum(sizes[key] for key in of_logits)
    return _SavedBytes(sum(sizes.values()) - logits, logits)


def _loss(model: nn.Module, config: Config, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Computes the loss of a batch of zeros."""
    shape = (config.optim.batch_size, config.model.seq_len)
    inputs, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    with autocast(device, dtype):
        return model(inputs, targets_BT=targets).sum()


def _temporaries(config: Config, device: torch.device, dtype: torch.dtype, scratch: dict[str, int]) -> int:
    """Counts the temporary tensors at the worse of two moments of a compiled backward.

    At its start the gradients of the logits (in place of the logits), of the last weights, and of the last block's
    output exist. Later the logits are gone, and the gradients within a block exist, with the tensors that a recomputed
    block keeps, those within an operator, and the gradient of the last weights.
    """
    model, width = config.model, dtype.itemsize
    rows, vocabulary = config.optim.batch_size * model.seq_len, padded_vocabulary(model.vocab_size)
    at_start = width * (vocabulary * model.dim + rows * model.dim)
    units = feed_forward_activation(model).total_width
    within_operator = max(scratch.values(), default=0)
    in_block = rows * (width * units + 4 * model.dim) + 4 * vocabulary * model.dim + within_operator
    if config.run.activation_checkpointing:
        plain = config.model_copy(update={"run": config.run.model_copy(update={"activation_checkpointing": False})})
        one, two = (_saved(plain, device, dtype, depth) for depth in (1, 2))
        in_block += two.activations - one.activations
    return max(at_start, in_block - width * rows * vocabulary)


class _MemoryTrace(TorchDispatchMode):
    """Within it, follows the memory of every new tensor. An operator takes `scratch` bytes more, by its name."""

    def __init__(self, scratch: dict[str, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._scratch = scratch
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        within = next((size for name, size in self._scratch.items() if str(function).startswith(name)), 0)
        self.peak = max(self.peak, self.now + within)
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def _model(config: Config, device: torch.device) -> Transformer:
    with torch.device(device):
        model = Transformer(config.model, config.run.backend)
    model.activation_checkpointing = config.run.activation_checkpointing
    AuxiliaryLosses(config.optim, model, config.optim.grad_accum, device, {})
    if config.optim.truncated_share:  # Truncated steps take the most memory.
        for block in model.each_block():
            block.attention.edit_rows = Truncation(config.optim.truncated_keys)
    return model.train()


def _parameters(config: ModelConfig, wanted: Callable[[str, Tensor], bool] = lambda name, p: True) -> int:
    return sum(p.numel() for name, p in model_of_shapes(config).named_parameters() if wanted(name, p))


def _workspaces(device: torch.device, captured: bool) -> int:
    """Returns the bytes of cuBLAS, which has a workspace for each thread and stream.

    There is one for the forward, one for the backward, and two more for the stream that captures graphs.
    """
    if device.type != "cuda":
        return 0
    each = 32 * MIB if torch.cuda.get_device_capability(device) >= (9, 0) else 8320 * 1024
    return (4 if captured else 2) * each


def _scratch(config: Config, device: torch.device, choice: Choice) -> dict[str, int]:
    """Returns the bytes within an operator in PyTorch, by the start of its name."""
    batch_size = config.optim.batch_size
    of_attention = attention_rule(config.model).scratch(batch_size, device, choice)
    return of_attention | feed_forward_activation(config.model).scratch(batch_size, choice)
