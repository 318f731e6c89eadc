"""Everything that a run needs before its first step: data, model, optimizer, and the place to go on from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cda_cli import __version__
from cda_cli.config import Config
from cda_cli.data import (
    Batch,
    StreamedBatches,
    Tokenizer,
    Tokens,
    TrainBatches,
    check_lengths,
    count_windows,
    load_tokenizer,
    prepare,
    streamed_validation,
)
from cda_cli.errors import CheckpointError, DeviceError
from cda_cli.model import Transformer, model_backend, state_tensors
from cda_cli.restore import check_model, fill
from cda_cli.runtime import pick_device, pick_dtype, random_states, restore_random_states
from cda_cli.storage import Checkpoint, pack_optimizer, unpack_optimizer
from cda_cli.training.finite import require_finite_weights
from cda_cli.training.optimizer import build_optimizer


@dataclass
class RunData:
    """The data of a run. `open_batches` takes the position to go on from, or None; `windows` are those of one pass
    over the training text, unknown (None) where it is streamed."""

    tokenizer: Tokenizer
    validation: Tokens
    bytes_per_token: float
    description: str
    windows: int | None
    open_batches: Callable[[Mapping[str, Any] | None], Iterator[tuple[Batch, dict[str, Any]]]]


@dataclass
class Setup:
    """A run that is ready for its next step. `compiled` is `model`, or torch.compile's wrapper of it."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    data: RunData
    model: Transformer
    compiled: nn.Module
    optimizer: torch.optim.AdamW
    batches: Iterator[tuple[Batch, dict[str, Any]]]
    step: int
    tokens: int
    position: dict[str, Any] | None

    def publishable(self) -> dict[str, Any]:
        """What a checkpoint of this moment holds, for `storage.publish`. Raises TrainingError for weights that are not
        finite."""
        model = state_tensors(self.model)
        require_finite_weights(self.step, model)
        optimizer, plain = pack_optimizer(self.optimizer.state_dict())
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position,
            "config": self.config.model_dump(mode="json"),
            "optimizer": plain,
            "versions": {"cda": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]},
        }
        return {
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "rng": random_states(),
            "state": state,
            "tokenizer_json": self.data.tokenizer.to_json(),
            "keep": self.config.run.keep,
        }


def open_data(
    config: Config,
    *,
    show_progress: bool,
    should_stop: Callable[[], bool] = lambda: False,
    spare_cache: Path | None = None,
) -> RunData:
    """Prepares the text, or opens it as a stream. Raises DataError where a side is shorter than one sequence.

    `spare_cache` is where tokens go that are not in the cache yet, for a run that must leave nothing behind.
    """
    data, optim, seq_len = config.data, config.optim, config.model.seq_len
    if data.streaming:
        tokenizer = load_tokenizer(data.tokenizer)
        wanted = config.run.eval_batches * optim.batch_size * seq_len + 1
        validation = streamed_validation(data, tokenizer, wanted)
        count_windows(validation, seq_len, "validation")
        return RunData(
            tokenizer,
            validation,
            validation.bytes_per_token,
            f"{data.source}, streamed",
            None,
            lambda position: StreamedBatches(data, tokenizer, seq_len, optim.batch_size, position),
        )
    corpus = prepare(data, show_progress=show_progress, should_stop=should_stop, spare_cache=spare_cache)
    check_lengths(corpus, seq_len)
    return RunData(
        corpus.tokenizer,
        corpus.validation,
        corpus.train.bytes_per_token,
        corpus.description,
        count_windows(corpus.train, seq_len),
        lambda position: TrainBatches(corpus.train, seq_len, optim.batch_size, config.run.seed, position),
    )


def build(
    config: Config, data: RunData, checkpoint: Checkpoint | None = None, note: Callable[[str], None] = print
) -> Setup:
    """Model, optimizer and batches of `config`, as `checkpoint` left them where there is one."""
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device)
    torch.manual_seed(config.run.seed)
    describe_backend(config, device)  # a backend that cannot run is an error before any work
    if checkpoint:
        check_model(checkpoint, config)
    model = Transformer(config.model, config.run.backend).to(device)
    optimizer = build_optimizer(model, config.optim)
    state: Mapping[str, Any] = checkpoint.state if checkpoint else {"step": 0, "tokens": 0, "position": None}
    if checkpoint:
        fill(model, checkpoint, config)
        configured = [(group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
        fill_optimizer(optimizer, checkpoint)
        for group, (weight_decay, betas) in zip(optimizer.param_groups, configured, strict=True):
            # A resumed run may change these, and loading has put back the old ones.
            group.update(weight_decay=weight_decay, betas=betas)
        restore_random_states(checkpoint.rng)
    return Setup(
        config=config,
        device=device,
        dtype=dtype,
        data=data,
        model=model,
        compiled=_compile(model, config, device, note),
        optimizer=optimizer,
        batches=data.open_batches(state["position"]),
        step=state["step"],
        tokens=state["tokens"],
        position=state["position"],
    )


def fill_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's moments into `optimizer`. Raises CheckpointError where they are not those of its model."""
    try:
        optimizer.load_state_dict(unpack_optimizer(checkpoint.optimizer, checkpoint.state["optimizer"]))
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(value.shape)} for {tuple(parameter.shape)}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the optimizer in {checkpoint.path} is not that of its model ({error}); use an earlier checkpoint"
        ) from error


def with_vocabulary(config: Config, data: RunData) -> Config:
    """The configuration with the vocabulary of the tokenizer."""
    model = config.model.model_copy(update={"vocab_size": data.tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


def remarks(config: Config) -> list[str]:
    """What is allowed, but probably not what was meant."""
    model, said = config.model, []
    keys = model.seq_len + model.null_kv
    if model.attention == "coordinate-descent" and model.attn_k >= keys:
        said.append(f"attn_k {model.attn_k:g} covers all {keys} keys of a row: every weight is 1")
    if model.ff == "coordinate-descent" and model.ff_k >= model.ff_width:
        said.append(f"ff_k {model.ff_k:g} covers all {model.ff_width} units of a row: every activation is 1")
    if model.learned_k and model.attention == "softmax":
        said.append("learned_k has no effect with softmax attention; its control there is output_gate")
    return said


def describe_backend(config: Config, device: torch.device) -> str:
    """Which code computes the attention and the feed-forward, and why."""
    model = config.model
    if model.attention == "softmax" and model.ff == "gelu":
        return "PyTorch SDPA (no layer selects with coordinate descent)"
    try:
        choice = model_backend(model, config.run.backend, device)
    except ValueError as error:
        raise DeviceError(str(error)) from error
    return f"{choice.name}, {model.solver} solver ({choice.reason})"


def _compile(model: Transformer, config: Config, device: torch.device, note: Callable[[str], None]) -> nn.Module:
    wanted = config.run.compile
    if wanted is None:
        wanted = device.type == "cuda"
    if wanted and config.model.eps_anneal_start is not None:
        note("torch.compile is off: an ε that changes every step would compile every step")
        wanted = False
    return torch.compile(model) if wanted else model  # type: ignore[return-value]
