"""Restores a model from a checkpoint, and opens a text for it, as eval, sample and inspect-sparsity need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from cda_cli.config import MOST_ALIBI_POSITIONS, Config, ModelConfig, annealed_eps, parse
from cda_cli.data import (
    Batch,
    Preparation,
    PreparationStoppedError,
    Task,
    Tokenizer,
    Tokens,
    Windows,
    check_task_tokenizer,
    document_windows,
    is_task,
    is_there,
    load_tokenizer,
    parse_task,
    prepare,
    prepare_whole,
    streamed_source,
    streamed_validation,
    task_tokens,
    tokenizer_from_json,
    whole_windows,
)
from cda_cli.errors import CheckpointError, ConfigError, DataError, brief, did_you_mean
from cda_cli.model import Transformer, expected_tensors, load_state_tensors, model_backend
from cda_cli.ops import Backend
from cda_cli.runs.folder import locate_checkpoint, saved_config
from cda_cli.runtime import pick_device, pick_dtype
from cda_cli.settings import Dtype, Side
from cda_cli.signals import StopRequest
from cda_cli.storage import AVERAGE, WEIGHTS, Checkpoint, StoredTensor, check_fits, load

TASK_EXAMPLES = 1024  # A task has no end, so the loss is that of so many of its examples.
STREAMED_TOKENS = 2**20  # A stream has no end, so at most so many tokens of its held-out documents are evaluated.


class Restored(NamedTuple):
    """A model in evaluation mode on its device, with all that its checkpoint says.

    `averaged` says whether the weights are the moving average.
    """

    model: Transformer
    config: Config
    tokenizer: Tokenizer
    state: dict[str, Any]
    path: Path
    device: torch.device
    averaged: bool = False

    @property
    def weights_file(self) -> str:
        """The name, in the folder at `path`, of the file that its weights are from."""
        return AVERAGE if self.averaged else WEIGHTS


class Saved(NamedTuple):
    """What a checkpoint says of its model, without the weights."""

    path: Path
    config: Config
    tokenizer: Tokenizer


def open_saved(path: Path, *, best: bool = False) -> Saved:
    """Reads a checkpoint as `restore` does, but for the weights. Raises CheckpointError if there is no such one."""
    checkpoint = load(locate_checkpoint(path, best=best), parts=())
    return Saved(checkpoint.path, saved_config(checkpoint), tokenizer_of(checkpoint))


def restore(
    path: Path,
    device: torch.device,
    backend: Backend = "auto",
    *,
    best: bool = False,
    ema: bool = False,
    context: int | None = None,
) -> Restored:
    """Restores the model of a checkpoint, or of the newest intact checkpoint of a run, or with `best` of its best one.

    With `ema` the weights are the moving average. The model takes `context` tokens, if that is more than it was trained
    with. Raises CheckpointError if there is no such checkpoint or average, and ConfigError if the model lacks positions
    for `context`.
    """
    part = "ema" if ema else "model"
    checkpoint = load(locate_checkpoint(path, best=best), parts=(part,))
    config = saved_config(checkpoint)
    if ema and not checkpoint.ema:
        raise CheckpointError(
            f"{checkpoint.path} has no moving average of the weights; leave --ema out, or train with "
            "--set optim.ema_decay=0.999"
        )
    weights = checkpoint.ema if ema else checkpoint.model
    check_weights(weights, checkpoint, config)
    model = Transformer(_with_context(config.model, context, checkpoint.path), backend)
    load_weights(model, weights, checkpoint, config)
    tokenizer = tokenizer_of(checkpoint)
    return Restored(model.to(device).eval(), config, tokenizer, checkpoint.state, checkpoint.path, device, ema)


def _with_context(config: ModelConfig, context: int | None, path: Path) -> ModelConfig:
    """The settings of a model that takes `context` tokens at least, whose positions mean what they did in training."""
    if context is None or context <= config.seq_len:
        return config
    if config.position == "learned":
        raise ConfigError(
            f"{path} has learned positions for {config.seq_len} tokens, and {context} are asked for; give --context "
            f"{config.seq_len} or less"
        )
    if config.position == "nape" and context > MOST_ALIBI_POSITIONS:
        raise ConfigError(f"nape positions end at {MOST_ALIBI_POSITIONS}; give a --context up to that")
    return config.model_copy(update={"seq_len": context, "rotary_original_len": config.rotary_trained_len})


def restore_on(
    path: Path,
    device: str,
    dtype: str,
    backend: str,
    *,
    best: bool = False,
    ema: bool = False,
    context: int | None = None,
) -> tuple[Restored, torch.dtype]:
    """Calls `restore` with device, dtype and backend as a command line names them.

    Also returns the dtype of the matrix products. Raises ConfigError or DeviceError for what cannot run here.
    """
    return on_device(device, dtype, backend, partial(restore, path, best=best, ema=ema, context=context))


def on_device(
    device: str, dtype: str, backend: str, restore: Callable[[torch.device, Backend], Restored]
) -> tuple[Restored, torch.dtype]:
    """Calls `restore` with device and backend as a command line names them, and returns what `restore_on` does."""
    if dtype not in get_args(Dtype):
        raise ConfigError(f"unknown dtype {dtype!r}: {did_you_mean(dtype, get_args(Dtype))}")
    where = pick_device(device)
    restored = restore(where, cast(Backend, backend))
    try:
        model_backend(restored.config.model, cast(Backend, backend), where)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return restored, pick_dtype(cast(Dtype, dtype), where)


class TextSide(NamedTuple):
    """The part `split` of a text, in the tokens of a model. Its `sides` are evaluated one after another.

    `seq_len` is the context of the model, or another that was asked for.
    """

    sides: list[Tokens]
    tokenizer: Tokenizer
    seq_len: int
    description: str
    split: str

    @property
    def has_answers(self) -> bool:
        """Whether only some tokens are to be predicted: the answers to the examples of a task."""
        return any(side.is_target is not None for side in self.sides)

    def in_windows_of(self, context: int | None) -> TextSide:
        """The same text in windows of `context` tokens, or of the model's context if that is None.

        Raises ConfigError for the examples of a task, each of which is a window.
        """
        if context is not None and self.has_answers:
            raise ConfigError("a task has an example in each window; leave --context out")
        return self._replace(seq_len=context or self.seq_len)

    def batches(self, batch_size: int, max_batches: int | None = None) -> tuple[Iterator[Batch], int]:
        """Returns the batches of its disjoint windows in order, and the number of windows in them.

        Each token but the first of a side, or each of an answer, is a target once. Raises DataError if a side has fewer
        than two tokens.
        """
        windows = self.windows(most=None if max_batches is None else max_batches * batch_size)
        return windows.batches(batch_size), len(windows)

    def windows(
        self, context: int | None = None, stride: int | None = None, per_document: bool = False, most: int | None = None
    ) -> Windows:
        """Returns the windows in which it is evaluated, or the first `most` of them (see `cda_cli.data.windows`).

        The default of `context` is that of the model, and that of `stride` the context, for disjoint windows. Raises
        DataError if there is nothing to predict.
        """
        context = context or self.seq_len
        if per_document:
            return document_windows(self.sides, self.tokenizer, context, stride or context).take(slice(most))
        return whole_windows(self.sides, context, stride or context, most)


SPLITS = get_args(Side)


def own_task(config: Config) -> Task | None:
    """Returns the synthetic task that a run is trained on, or None if it is trained on a text."""
    return parse_task(config.data.source) if is_task(config.data.source) else None


def open_side(
    restored: Restored | Saved,
    data: str | None,
    split: str | None,
    stop: StopRequest,
    show_progress: bool,
    encoding: str | None = None,
) -> TextSide:
    """Opens a text in the tokens of the restored model: `data`, or the run's own text if that is None.

    `split` is one of SPLITS. Its default is "validation" for the run's own text, and "all" for another, of which the
    model has seen nothing. The default of `encoding` is the run's for its own text, and UTF-8 for another. Raises
    DataError for a text that cannot be read, and ConfigError for another split.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
    config, seq_len = restored.config.data, restored.config.model.seq_len
    if is_task(data or config.source):
        return _task_side(restored, data or config.source, split)
    own = data is None or data == config.source or Path(data).expanduser().resolve() == Path(config.source).resolve()
    split = split or ("validation" if own else "all")
    if data is not None:
        config = config.model_copy(update={"source": data, "streaming": False})
        config = config if own else config.model_copy(update={"encoding": "utf-8"})
    elif not is_there(config.source):
        raise DataError(f"the text of the run, {config.source}, has gone; put it back, or name another with --data")
    if encoding is not None:
        config = parse({"data": config.model_dump() | {"encoding": encoding}}).data
    if config.streaming:
        if split != "validation":
            raise ConfigError("the run's text is streamed; evaluate its validation split, or name a text with --data")
        preparation = Preparation(show_progress, lambda: bool(stop))
        held_out = streamed_validation(
            config, restored.tokenizer, STREAMED_TOKENS, streamed_source(config, preparation)
        )
        return TextSide([held_out], restored.tokenizer, seq_len, f"{config.source}, streamed", split)
    how: Any = {"tokenizer": restored.tokenizer, "show_progress": show_progress, "should_stop": lambda: bool(stop)}
    try:
        if split == "all" and not own:  # in one piece, as nothing was held out
            whole, description = prepare_whole(config, **how)
            return TextSide([whole], restored.tokenizer, seq_len, description, split)
        corpus = prepare(config, **how)
    except PreparationStoppedError as error:
        stop.check(str(error))
        raise
    sides = {"train": [corpus.train], "validation": [corpus.validation], "all": [corpus.train, corpus.validation]}
    return TextSide(sides[split], restored.tokenizer, seq_len, corpus.description, split)


def _task_side(restored: Restored | Saved, source: str, split: str | None) -> TextSide:
    task, seq_len = parse_task(source), restored.config.model.seq_len
    if split not in (None, "validation"):
        raise ConfigError(f"{source} is made from a seed and has one side to evaluate; leave --split out")
    check_task_tokenizer(task, restored.tokenizer)
    tokens = task_tokens(task, seq_len, TASK_EXAMPLES)
    return TextSide([tokens], restored.tokenizer, seq_len, task.description, "validation")


def check_weights(tensors: Mapping[str, Tensor | StoredTensor], checkpoint: Checkpoint, config: Config) -> None:
    """Raises CheckpointError if `tensors` do not fit the model that `config` describes, before it takes any memory.

    `tensors` are the weights of `checkpoint`, or their average.
    """
    try:
        if config.model.depth > len(tensors):
            raise CheckpointError(
                f"{checkpoint.path} has {len(tensors)} tensors, too few for the {config.model.depth} blocks "
                "of the configuration; use the configuration it was trained with"
            )
        expected = expected_tensors(config.model)
    except RuntimeError as error:  # a size that no tensor can have
        raise CheckpointError(
            f"no model can be as the configuration of {checkpoint.path} says ({brief(error)}); use an earlier one"
        ) from error
    check_fits(tensors, expected)


def load_weights(model: Transformer, tensors: dict[str, Tensor], checkpoint: Checkpoint, config: Config) -> None:
    """Loads `tensors`, which must fit (see `check_weights`), into `model`, and sets its ε to that of the step."""
    load_state_tensors(model, tensors)
    model.set_attention_eps(annealed_eps(config.model, checkpoint.state["step"], config.schedule_steps))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """Returns the tokenizer that the model was trained with, which the checkpoint holds."""
    if not checkpoint.tokenizer_json:
        return load_tokenizer("bytes")
    data = saved_config(checkpoint).data
    return tokenizer_from_json(checkpoint.tokenizer_json, bos=data.bos, eos=data.eos)
