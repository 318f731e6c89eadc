"""A whole run: find where to go on from → data → model → the loop. Or a dry run: the plan, and one batch."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cda_cli.config import Config
from cda_cli.data import PreparationStoppedError, Tokenizer, bpe_size, count_windows
from cda_cli.model import editing
from cda_cli.plurals import counted
from cda_cli.restore import tokenizer_of
from cda_cli.runs.early_stop import Patience
from cda_cli.runs.folder import Run, saved_config
from cda_cli.runs.metrics import Metrics, NullMetrics
from cda_cli.runs.records import InitRecord
from cda_cli.runtime import available_memory, cpu_threads, describe_device, deterministic, peak_memory
from cda_cli.settings import MOST_THREADS
from cda_cli.signals import StopRequest
from cda_cli.storage import Checkpoint, load, locate, open_checkpoint
from cda_cli.streams import when_stdout_is_lost
from cda_cli.training.accounting.disk_space import check_space
from cda_cli.training.accounting.memory_forecast import Forecast, forecast, is_small, memory_remark
from cda_cli.training.display import Display, Plan
from cda_cli.training.distributed.agreement import check_same_settings, check_same_start
from cda_cli.training.distributed.launch import STOPPED_BEFORE_START
from cda_cli.training.distributed.processes import ALONE, Processes
from cda_cli.training.gradients import accumulate_gradients, clip_gradients
from cda_cli.training.initial_weights import InitialWeights, read_initial_weights
from cda_cli.training.loop import train, validation_due
from cda_cli.training.nonfinite import StepResult
from cda_cli.training.optimizer import GuardedOptimizer
from cda_cli.training.pipeline import draw
from cda_cli.training.resume import (
    check_fork,
    check_same_beginning,
    check_same_model,
    check_same_run,
    check_same_text,
    check_same_tokens,
    find_checkpoint,
)
from cda_cli.training.setup import (
    build,
    config_warnings,
    describe_backend,
    describe_peak,
    open_data,
    with_absolute_paths,
    with_vocabulary,
)
from cda_cli.training.state import THREADS, RunContext, TrainState
from cda_cli.training.trackers import check_trackers, open_trackers


class DryRun(NamedTuple):
    """The plan, the loss of one batch, and memory.

    `forecast` is None for the published code, which cannot be followed. `peak` is measured, in bytes: of two steps on a
    GPU, and elsewhere of the whole process with one batch. `loss` and `peak` are None if the batch does not fit and was
    not tried.
    """

    plan: Plan
    loss: float | None
    optimizer: str
    forecast: Forecast | None
    peak: int | None
    on_gpu: bool


def run_training(
    config: Config, run: Run, resume: str, display: Display, stop: StopRequest, processes: Processes = ALONE
) -> None:
    """Trains into the folder of `run` (see `find_checkpoint` for `resume`), and shows everything on `display`.

    Each of several processes calls this, and only the first writes. Raises StorageError if another run writes into
    `run`.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(when_stdout_is_lost(stop.lose))  # a failing print must not lose a run
        check_same_settings(config, processes)
        if processes.first:
            check_trackers(config.run.track)
            run.check()
            held.enter_context(run.lock(display.note))
        held.enter_context(deterministic(config.run.deterministic))
        with stop.at_once(STOPPED_BEFORE_START):
            checkpoint = _find(run, resume, display, processes)
        held.enter_context(cpu_threads(_threads(config, checkpoint, display, processes)))
        _run(config, run, checkpoint, display, stop, processes)


def _run(
    config: Config, run: Run, checkpoint: Checkpoint | None, display: Display, stop: StopRequest, processes: Processes
) -> None:
    with stop.at_once(STOPPED_BEFORE_START):
        context, state, beginning = _set_up(config, run, checkpoint, display, stop, processes)
        if checkpoint:
            checkpoint.release()  # All of it is in model, optimizer and average by now.
        check_same_start(context, state, run)
    config = context.config
    validations = processes.broadcast_text("validations", lambda: json.dumps(_validations(run, config, state.step)))
    losses, owes_validation = json.loads(validations)
    if checkpoint and state.step >= config.optim.steps and not owes_validation:
        display.note(f"{run.path} has all its {counted(state.step, 'step')}; raise --steps to go on")
        return
    if checkpoint:
        display.note(f"resuming from {checkpoint.path}, step {state.step}")
        before = saved_config(checkpoint).schedule_steps
        if before != config.schedule_steps:
            display.note(
                f"the learning-rate schedule is now {counted(config.schedule_steps, 'step')} long and was {before:,}; "
                f"--set optim.schedule_steps={before} keeps it"
            )
    unknown = describe_peak(context.device, context.dtype)
    if unknown:
        display.note(unknown)
    if context.device.type == "cpu" and not is_small(config) and (expected := _forecast(context)):
        remark = _memory_remark(context, expected)
        if remark:
            display.note(remark)
    patience = Patience(config.run.patience, losses)
    if patience.over:
        display.note(f"{run.path} was stopped early: {patience.words()}; raise --set run.patience to go on")
        return
    if processes.first:
        check_space(run, config.run, state)
    metrics = _open_metrics(run, config, state.step) if processes.first else NullMetrics()
    try:
        if beginning:
            metrics.write(beginning)
        display.start(make_plan(context, state, run), run.metrics())
        train(context, state, run, metrics, display, processes.agreed(stop), patience, owes_validation)
    finally:
        metrics.close()
        display.finish()


def _validations(run: Run, config: Config, step: int) -> tuple[list[float], bool]:
    """The losses of the validations up to `step`, and whether that of `step` is due and was not made."""
    return run.validation_losses(step), validation_due(config, step) and run.lacks_validation(step)


def dry_run(
    config: Config,
    run: Run,
    resume: str,
    display: Display,
    stop: StopRequest,
    show_forecast: Callable[[DryRun], None] = lambda known: None,
) -> DryRun:
    """Builds everything and tries it (see `DryRun`). It writes nothing but a cache that it removes.

    `show_forecast` gets the plan and the forecast before anything is tried, as the trial may use up the memory.
    """
    with (
        deterministic(config.run.deterministic),
        cpu_threads(config.run.threads),
        stop.at_once("stopped; nothing was written"),
        tempfile.TemporaryDirectory(prefix="cda-dry-run-") as cache,
    ):
        checkpoint = _find(run, resume, display, ALONE)
        context, state, _ = _set_up(config, run, checkpoint, display, stop, ALONE, spare_cache=Path(cache))
        plan, expected = make_plan(context, state, run), _forecast(context)
        fits = expected is None or _memory_remark(context, expected) is None
        name = "Muon and AdamW" if config.optim.optimizer == "muon" else "AdamW"
        known = DryRun(plan, None, name, expected, None, on_gpu=context.device.type == "cuda")
        show_forecast(known)
        loss, peak = try_steps(context, state) if fits else (None, None)
        return known._replace(loss=loss, peak=peak)


def _open_metrics(run: Run, config: Config, step: int) -> Metrics:
    """Writes the settings of the run, and opens its metrics and trackers after `step`."""
    run.write_config(config)
    return run.open_metrics(step, open_trackers(run, config, step))


def _forecast(context: RunContext) -> Forecast | None:
    """Forecasts memory; None for the published code, which cannot be followed."""
    if context.backend.name == "colt5":
        return None
    captured = bool(context.graphs)
    return forecast(context.config, context.device, context.dtype, context.is_compiled, captured, context.backend)


def _memory_remark(context: RunContext, expected: Forecast) -> str | None:
    # The weights are allocated already.
    left = available_memory() if context.device.type == "cpu" else None
    return memory_remark(expected.peak - expected.weights, left)


def try_steps(context: RunContext, state: TrainState) -> tuple[float, int]:
    """Returns the loss of the first batch, and the peak of memory in bytes.

    A GPU takes two whole steps, since only the second meets the optimizer's state, of up to two batches each, since
    only the second batch meets gradients. A CPU computes the gradients of one batch. The steps are truncated if any
    are, as those take the most memory.
    """
    with editing(state.model, rows=context.truncation):
        return _try_steps(context, state)


def _try_steps(context: RunContext, state: TrainState) -> tuple[float, int]:
    device, dtype, optim = context.device, context.dtype, context.config.optim
    if device.type == "cpu":
        loss = accumulate_gradients(context.compiled, draw(state, 1)[0], device, dtype)
        return loss.item(), peak_memory(device)
    graphs = context.graphs.get(context.truncation is not None)
    torch.cuda.reset_peak_memory_stats(device)
    optimizer = GuardedOptimizer(state.optimizer)
    losses = []
    for _ in range(2):
        batches, _ = draw(state, min(2, optim.grad_accum))
        loss = accumulate_gradients(context.compiled, batches, device, dtype, graphs=graphs)
        result = StepResult(loss, clip_gradients(state.model, optim.clip))
        optimizer.launch(result)
        values = result.read()
        optimizer.settle(values.is_finite)
        losses.append(values.loss)
    return losses[0], peak_memory(device)


def make_plan(context: RunContext, state: TrainState, run: Run) -> Plan:
    config, windows = context.config, context.data.windows
    per_step = config.optim.batch_size * config.optim.grad_accum
    validation = context.data.validation
    return Plan(
        run=run.path,
        config=config,
        data=context.data.description,
        parameters=state.model.parameter_count(),
        attention=state.model.attention_description,
        has_budget=state.model.attention_rule.has_budget,
        device=describe_device(context.device),
        dtype=str(context.dtype).removeprefix("torch."),
        compiled=context.is_compiled,
        cuda_graphs=bool(context.graphs),
        backend=describe_backend(config, context.backend),
        first_step=state.step,
        steps=config.optim.steps,
        tokens_per_step=per_step * config.model.seq_len,
        epochs=config.optim.steps * per_step / windows if windows else None,
        validation_windows=count_windows(validation, config.model.seq_len) if windows else None,
        processes=str(context.processes.mesh),
        prompt=context.data.prompt,
    )


def _threads(config: Config, checkpoint: Checkpoint | None, display: Display, processes: Processes) -> int | None:
    """Returns the number of CPU threads: the one asked for, or else the one that the run began with.

    It decides how sums are split, and so their last bits.
    """
    begun = checkpoint.state.get(THREADS) if checkpoint else None
    if config.run.threads or processes.count > 1 or type(begun) is not int or not 1 <= begun <= MOST_THREADS:
        return config.run.threads
    here = torch.get_num_threads()
    if begun != here:
        display.note(
            f"the run goes on with {counted(begun, 'CPU thread')}, as it began, for the same bits; --set "
            f"run.threads={here} takes the {here} of this process"
        )
    return begun


def _find(run: Run, resume: str, display: Display, processes: Processes) -> Checkpoint | None:
    """Finds the checkpoint to go on from. The first process looks for it, and the others take the same.

    Several processes only open it, and each reads its part later. A single one loads it.
    """
    if not processes.first:
        path = processes.store_wait("checkpoint")
        return open_checkpoint(Path(path)) if path else None
    checkpoint, damaged = find_checkpoint(run, resume, load if processes.count == 1 else open_checkpoint)
    for sentence in damaged:
        display.note(sentence)
    processes.store_set("checkpoint", str(checkpoint.path) if checkpoint else "")
    return checkpoint


def _begin(config: Config, checkpoint: Checkpoint | None, processes: Processes) -> tuple[Config, InitialWeights | None]:
    """Reads the weights that a new run starts from, if it starts from any. A run that goes on needs them no more.

    Returns them with the settings, which then name their very checkpoint. The first process finds it for all.
    """
    if checkpoint:
        before = saved_config(checkpoint)
        check_same_beginning(before, config, checkpoint.path)
        return _with_beginning(config, before.run.init_from), None
    if config.run.init_from is None:
        return config, None
    named = Path(config.run.init_from).expanduser()
    path = Path(processes.broadcast_text("initial weights", lambda: str(locate(named).resolve())))
    config = _with_beginning(config, str(path))
    return config, read_initial_weights(path, config)


def _with_beginning(config: Config, init_from: str | None) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"init_from": init_from})})


def _trained_tokenizer(
    config: Config, checkpoint: Checkpoint | None, initial: InitialWeights | None
) -> Tokenizer | None:
    """Returns the tokenizer that came with the weights, if the settings alone might not give it again.

    Another version of the library might train another on the same text, and a file of another run may have gone.
    """
    if initial:
        return initial.tokenizer
    spec, begun = config.data.tokenizer, config.run.init_from is not None
    if checkpoint is None or saved_config(checkpoint).data.tokenizer != spec or not (begun or bpe_size(spec)):
        return None
    return tokenizer_of(checkpoint)


def _set_up(
    config: Config,
    run: Run,
    checkpoint: Checkpoint | None,
    display: Display,
    stop: StopRequest,
    processes: Processes,
    spare_cache: Path | None = None,
) -> tuple[RunContext, TrainState, InitRecord | None]:
    """Also returns which weights of another run it starts from. They are not kept beside the model."""
    config, initial = _begin(config, checkpoint, processes)
    try:
        data = open_data(
            config,
            show_progress=display.interactive,
            should_stop=lambda: bool(stop),
            spare_cache=spare_cache,
            tokenizer=_trained_tokenizer(config, checkpoint, initial),
            processes=processes,
        )
    except PreparationStoppedError as error:
        stop.check(str(error))
        raise
    trained = saved_config(checkpoint) if checkpoint else initial.config if initial else None
    config = with_vocabulary(with_absolute_paths(config), data, trained)  # errors named the paths as they were given
    if checkpoint:
        before = with_absolute_paths(saved_config(checkpoint))
        if checkpoint.state["optimizer"]:
            known = checkpoint.state.get("data")  # None in a checkpoint of a version that did not save it
            check_same_run(before, config, run.path, same_text=known == data.identity)
            check_same_text(known, data.identity, data.description, run.path)
        else:  # An imported model has been trained on no text here.
            check_same_model(before, config, run.path)
            check_same_tokens(tokenizer_of(checkpoint), data.tokenizer, run.path)
    if initial and initial.source:
        check_fork(initial.source, initial.config, config)
        known = initial.source.state.get("data")
        check_same_text(known, data.identity, data.description, initial.source.path)
    remarks = initial.remarks(config) if initial else []
    for sentence in [*remarks, *config_warnings(config), *filter(None, [data.remark])]:
        display.note(sentence)
    with display.busy("building the model"):
        context, state = build(config, data, checkpoint, display.note, processes, initial)
    return context, state, initial.record if initial else None
