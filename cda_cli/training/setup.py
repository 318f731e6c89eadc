"""Sets up a run before its first step: data, model, optimizer, and the place to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cda_cli.config import Config, DataConfig, annealed_eps
from cda_cli.data import (
    Prefetched,
    Preparation,
    StreamedBatches,
    TaskBatches,
    Tokenizer,
    TrainBatches,
    absolute_source,
    check_lengths,
    check_task_tokenizer,
    count_windows,
    is_task,
    load_tokenizer,
    loss_of_text,
    parse_task,
    prepare,
    streamed_source,
    streamed_validation,
    task_tokenizer,
    task_tokens,
)
from cda_cli.errors import CheckpointError, DataError, DeviceError
from cda_cli.model import (
    Transformer,
    Truncation,
    attention_rule,
    feed_forward_activation,
    fits_cuda_graph,
    load_state_tensors,
    model_backend,
    model_of_shapes,
    state_tensors,
    uses_soft_topk,
)
from cda_cli.ops import Choice
from cda_cli.restore import check_weights
from cda_cli.runtime import pick_dtype, start_compile_workers
from cda_cli.storage import Checkpoint, unpack_optimizer
from cda_cli.training.accounting.flops import peak_flops
from cda_cli.training.auxiliary_losses import AuxiliaryLosses
from cda_cli.training.average import WeightAverage
from cda_cli.training.distributed.processes import ALONE, Processes
from cda_cli.training.distributed.sharding import load_shards
from cda_cli.training.gradients import GradientGraphs
from cda_cli.training.initial_weights import InitialWeights
from cda_cli.training.optimizer import (
    Optimizer,
    build_optimizer,
    carry_moments,
    parameter_names,
    restore_optimizer,
)
from cda_cli.training.state import Batches, RunContext, RunData, TrainState


def open_data(
    config: Config,
    *,
    show_progress: bool,
    should_stop: Callable[[], bool] = lambda: False,
    spare_cache: Path | None = None,
    tokenizer: Tokenizer | None = None,
    processes: Processes = ALONE,
) -> RunData:
    """Prepares the text, or opens it as a stream. Raises DataError if a side is shorter than one sequence.

    The examples of a task are made while the model trains. The batches are the share of this process.

    `spare_cache` takes what is not in the cache yet, for a run that must leave nothing behind. `tokenizer` replaces the
    one that the settings name.
    """
    data, optim, seq_len = config.data, config.optim, config.model.seq_len
    if is_task(data.source):
        return _task_data(config, tokenizer, processes)
    preparation = Preparation(show_progress, should_stop, spare_cache)
    if data.streaming:
        return _streamed_data(config, preparation, tokenizer, processes)
    share = processes.share(optim)
    with processes.first_process_first():
        corpus = prepare(
            data,
            show_progress=show_progress,
            should_stop=should_stop,
            spare_cache=spare_cache,
            tokenizer=tokenizer,
            once=processes.once_on_machine if processes.count > 1 else None,
        )
    check_lengths(corpus, seq_len)
    return RunData(
        corpus.tokenizer,
        corpus.validation,
        corpus.description,
        count_windows(corpus.train, seq_len),
        loss_of_text([corpus.train, corpus.validation]),
        lambda position: TrainBatches(
            corpus.train, seq_len, share.size, config.run.seed, position, share.rows, shifted=data.shift_windows
        ),
        {
            "tokenizer": corpus.tokenizer.fingerprint,
            "training tokens": len(corpus.train),
            "validation tokens": len(corpus.validation),
            "content": [corpus.train.digest, corpus.validation.digest],
        },
    )


def _streamed_data(
    config: Config, preparation: Preparation, tokenizer: Tokenizer | None, processes: Processes
) -> RunData:
    """Opens the text as a stream in the first process, which alone reads it."""
    data, optim, seq_len = config.data, config.optim, config.model.seq_len
    if data.shift_windows:
        raise DataError("a stream has no windows to shift; leave out data.shift_windows, or data.streaming")
    with processes.first_process_first():
        tokenizer = tokenizer or load_tokenizer(data.tokenizer, data.bos, data.eos)
        if processes.first:
            # It is opened once: that may list a folder, read thousands of files, or ask a hub.
            source = streamed_source(data, preparation)
            wanted = config.run.eval_batches * optim.batch_size * seq_len + 1
            validation = streamed_validation(data, tokenizer, wanted, source)
            count_windows(validation, seq_len, "validation")
    if processes.count > 1:
        known = processes.broadcast((source.without_documents(), validation) if processes.first else None)
        if not processes.first:
            source, validation = known
    share = processes.share(optim)
    return RunData(
        tokenizer,
        validation,
        f"{source.description}, streamed",
        None,
        loss_of_text([validation]),
        lambda position: StreamedBatches(
            data, tokenizer, seq_len, share.size, position, share.rows, source, processes, share.batches
        ),
        {"tokenizer": tokenizer.fingerprint, **source.identity},
    )


def _task_data(config: Config, tokenizer: Tokenizer | None, processes: Processes) -> RunData:
    """Opens a synthetic task. Raises DataError if an example is longer than a sequence."""
    data, optim, seq_len = config.data, config.optim, config.model.seq_len
    task = parse_task(data.source)
    given = [
        f"data.{name}"
        for name in ("tokenizer", "bos", "eos", "streaming", "shift_windows")
        if name in _not_default(data)
    ]
    if given:
        raise DataError(f"{data.source} has tokens of its own; leave out {' and '.join(given)}")
    if tokenizer:
        check_task_tokenizer(task, tokenizer)
    tokenizer = task_tokenizer(task)
    share = processes.share(optim)
    return RunData(
        tokenizer,
        task_tokens(task, seq_len, config.run.eval_batches * optim.batch_size),
        task.description,
        None,
        None,
        lambda position: TaskBatches(task, seq_len, share.size, config.run.seed, position, share.rows),
        {"tokenizer": tokenizer.fingerprint, "task": task.spec},
        prompt=None,
    )


def _not_default(section: DataConfig) -> set[str]:
    """The settings whose values are not their defaults."""
    defaults = type(section)()
    return {name for name, value in section if value != getattr(defaults, name)}


def build(
    config: Config,
    data: RunData,
    checkpoint: Checkpoint | None = None,
    note: Callable[[str], None] = print,
    processes: Processes = ALONE,
    initial: InitialWeights | None = None,
) -> tuple[RunContext, TrainState]:
    """Builds model, optimizer and batches of `config`, as `checkpoint` left them if there is one.

    A new run starts from the `initial` weights, or else from random ones.

    Raises DeviceError if the device or the backend cannot run here, and CheckpointError for a checkpoint that is not of
    this model.
    """
    device = processes.device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device)
    torch.manual_seed(config.run.seed)
    backend = resolve_backend(config, device)  # before any work, as it may raise
    if checkpoint:
        check_weights(checkpoint.model, checkpoint, config)
    if checkpoint and processes.mesh.shards:
        model = model_of_shapes(config.model, config.run.backend)  # No process need ever hold a whole one.
    else:
        model = Transformer(config.model, config.run.backend).to(device)
    model.activation_checkpointing = config.run.activation_checkpointing
    if initial:
        load_state_tensors(model, state_tensors(model) | initial.carried.tensors)
    source = initial.source if initial else None
    begun = checkpoint or source
    saved: Mapping[str, Any] = begun.state if begun else {"step": 0, "tokens": 0, "position": None}
    share = processes.share(config.optim)
    auxiliary = AuxiliaryLosses(config.optim, model, share.batches, device, saved)
    is_compiled = uses_compile(config, device, note)
    if is_compiled and device.type == "cuda":
        start_compile_workers()
    wrapped = processes.wrap(model, config, device, dtype, is_compiled)
    if checkpoint:
        load_shards(state_tensors(model), checkpoint.model)
        model.set_attention_eps(annealed_eps(config.model, checkpoint.state["step"], config.schedule_steps))
    captured = uses_cuda_graphs(config, backend, device, is_compiled, processes, note)
    optimizer = build_optimizer(model, config.optim)
    if checkpoint and checkpoint.state["optimizer"]:  # an imported model comes without
        load_optimizer(optimizer, checkpoint)
    elif initial and source:
        fork_optimizer(optimizer, model, config, source, initial.config)
    processes.set_random_states(begun.rng if begun else None, config.run.seed, saved["step"], device)
    average = WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None
    if average and begun:
        if checkpoint and checkpoint.ema:
            check_weights(checkpoint.ema, checkpoint, config)
            average.load(checkpoint.ema)
        elif source and initial and initial.average:
            average.load(initial.average)
        else:
            note(f"the moving average of the weights begins at step {saved['step']}")
    context = RunContext(
        config=config,
        device=device,
        dtype=dtype,
        backend=backend,
        data=data,
        processes=processes,
        compiled=wrapped,
        is_compiled=is_compiled,
        truncation=Truncation(config.optim.truncated_keys) if config.optim.truncated_share else None,
        graphs=_graphs(wrapped, device, dtype, auxiliary.weights) if captured else {},
        inspection_stream=torch.cuda.Stream(device) if device.type == "cuda" and processes.count == 1 else None,
    )
    state = TrainState(
        model=model,
        auxiliary=auxiliary,
        optimizer=optimizer,
        average=average,
        # A thread makes the batches of the next step during this one. Those of a stream are made when they are asked
        # for if processes exchange their tokens, as the exchanges of all processes must come in the same order.
        batches=Prefetched(
            _pinned(data.open_batches(saved["position"]), device),
            ahead=0 if config.data.streaming and processes.count > 1 else share.batches,
        ),
        step=saved["step"],
        tokens=saved["tokens"],
        position=saved["position"],
    )
    return context, state


def _graphs(
    model: nn.Module, device: torch.device, dtype: torch.dtype, others: Sequence[Tensor]
) -> dict[bool, GradientGraphs]:
    """Makes graphs of truncated steps (True) and of others, which share memory: no two of them are in use at a time."""
    pool = torch.cuda.graph_pool_handle()
    return {truncated: GradientGraphs(model, device, dtype, pool, others) for truncated in (False, True)}


def _pinned(batches: Batches, device: torch.device) -> Batches:
    """Puts batches for a GPU into pinned memory (see `to_device`), in the thread that reads them."""
    if device.type != "cuda":
        return batches
    return ((batch.map(torch.Tensor.pin_memory), position) for batch, position in batches)


def load_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's moments into `optimizer`. Raises CheckpointError if they are not those of its model."""
    try:
        restore_optimizer(optimizer, unpack_optimizer(checkpoint.optimizer, checkpoint.state["optimizer"]))
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(value.shape)} for {tuple(parameter.shape)}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the optimizer in {checkpoint.path} is not that of its model ({error}); use an earlier checkpoint"
        ) from error


def fork_optimizer(
    optimizer: Optimizer, model: Transformer, config: Config, source: Checkpoint, before: Config
) -> None:
    """Puts the moments of another run's checkpoint into `optimizer`, where the model has the same parameters.

    `before` are the settings of that run, and `config` those of this one.
    """
    names_before = parameter_names(model_of_shapes(before.model), before.optim)
    state = unpack_optimizer(source.optimizer, source.state["optimizer"])
    carry_moments(optimizer, parameter_names(model, config.optim), state, names_before)


def with_absolute_paths(config: Config) -> Config:
    """Returns `config` with absolute paths of its text and its tokenizer, which are then found from any folder."""
    tokenizer = Path(config.data.tokenizer).expanduser()
    paths = {
        "source": absolute_source(config.data.source),
        "tokenizer": str(tokenizer.absolute()) if tokenizer.is_file() else config.data.tokenizer,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


def with_vocabulary(config: Config, data: RunData, trained: Config | None = None) -> Config:
    """Returns `config` with the vocabulary size of the tokenizer, or that of weights `trained` with another config."""
    size = trained.model.vocab_size if trained else data.tokenizer.vocab_size
    model = config.model.model_copy(update={"vocab_size": size})
    return config.model_copy(update={"model": model})


def config_warnings(config: Config) -> list[str]:
    """Returns a sentence about each setting that is allowed but can hardly be meant."""
    model = config.model
    return attention_rule(model).warnings() + feed_forward_activation(model).warnings() + config.optim.warnings()


def describe_backend(config: Config, choice: Choice) -> str:
    """Says which code computes the attention and the feed-forward, and why."""
    model = config.model
    if not uses_soft_topk(model):
        return f"{attention_rule(model).code} (no layer selects with coordinate descent)"
    return f"{choice.name}, {model.solver} solver ({choice.reason})"


def describe_peak(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why a GPU's utilisation is not shown; None if it is, or on a CPU."""
    if device.type == "cpu" or peak_flops(device, dtype) is not None:
        return None
    name, precision = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
    return f"the peak of {name} in {precision} is not known here, so model FLOPs utilisation is not shown"


def resolve_backend(config: Config, device: torch.device) -> Choice:
    """Chooses the backend of the layers. Raises DeviceError if a forced one, or the attention rule, cannot run here."""
    try:
        return model_backend(config.model, config.run.backend, device)
    except ValueError as error:
        raise DeviceError(str(error)) from error


def uses_compile(config: Config, device: torch.device, note: Callable[[str], None]) -> bool:
    """Whether the model is compiled: as the settings say, or by default on a GPU."""
    wanted = config.run.compile
    if wanted is None:
        wanted = device.type == "cuda"
    if wanted and attention_rule(config.model).recompiles_for_each_eps:
        note("torch.compile is off: an ε that changes every step would compile every step")
        return False
    return wanted


def uses_cuda_graphs(
    config: Config,
    choice: Choice,
    device: torch.device,
    is_compiled: bool,
    processes: Processes,
    note: Callable[[str], None],
) -> bool:
    """Whether CUDA graphs hold forward and backward: if that is possible, and unless the settings forbid it."""
    if config.run.cuda_graphs is False:
        return False
    possible = fits_cuda_graph(config.model, choice, device) and is_compiled and processes.count == 1
    if config.run.cuda_graphs and not possible:
        note("CUDA graphs are off: they take one process, a GPU, torch.compile, and the operator's backend triton")
    return possible
