"""A whole run: find where to go on from → data → model → the loop; or, for a dry run, one batch and the plan."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cda_cli.config import Config
from cda_cli.data import PreparationStoppedError, digest
from cda_cli.errors import ConfigError
from cda_cli.restore import saved_config
from cda_cli.runtime import available_memory, cpu_threads, describe_device, deterministic, peak_memory
from cda_cli.settings import MOST_THREADS
from cda_cli.signals import StopRequest
from cda_cli.storage import Checkpoint, load, only_writer
from cda_cli.streams import when_stdout_is_lost
from cda_cli.training.distribution import ALONE, Processes
from cda_cli.training.finite import StepResult
from cda_cli.training.gradients import accumulate_gradients, clip_gradients
from cda_cli.training.launch import NOT_BEGUN
from cda_cli.training.loop import Display, train
from cda_cli.training.memory import Forecast, forecast, is_small, memory_remark
from cda_cli.training.milestones import Patience
from cda_cli.training.optimizer import GuardedOptimizer
from cda_cli.training.pipeline import draw
from cda_cli.training.run_folder import (
    NoMetrics,
    check_folder,
    check_same_run,
    check_same_text,
    find_checkpoint,
    open_run,
    validation_losses,
)
from cda_cli.training.setup import (
    THREADS,
    Setup,
    build,
    config_warnings,
    describe_backend,
    describe_peak,
    open_data,
    resolve_backend,
    with_absolute_paths,
    with_vocabulary,
)
from cda_cli.training.space import check_space
from cda_cli.training.trackers import check_trackers


class Plan(NamedTuple):
    """What a run is about to do. Tokens are those of one step; `epochs` is None for streamed data."""

    run: Path
    data: str
    parameters: int
    device: str
    dtype: str
    compiled: bool
    cuda_graphs: bool
    backend: str
    first_step: int
    steps: int
    tokens_per_step: int
    epochs: float | None
    processes: str = "1"


class DryRun(NamedTuple):
    """The plan, the loss of one batch, and memory: as forecast (None for the published code, which cannot be followed),
    and the measured peak in bytes, on a GPU of two steps, elsewhere of the whole process with one batch. Loss and peak
    are None where the batch does not fit, and was not tried."""

    plan: Plan
    loss: float | None
    optimizer: str
    forecast: Forecast | None
    peak: int | None
    on_gpu: bool


def run_training(
    config: Config, run: Path, resume: str, display: Display, stop: StopRequest, processes: Processes = ALONE
) -> None:
    """Trains into the folder `run` (see `find_checkpoint` for `resume`); `display` hears of everything.

    Of several processes each calls this, and the first alone writes. Raises StorageError where another run writes into
    `run`.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(when_stdout_is_lost(stop.lose))  # what is printed never loses a run
        if processes.first:
            check_trackers(config.run.track)
            check_folder(run)
            held.enter_context(only_writer(run, display.note))
        held.enter_context(deterministic(config.run.deterministic))
        with stop.at_once(NOT_BEGUN):
            checkpoint = _find(run, resume, display, processes)
        held.enter_context(cpu_threads(_threads(config, checkpoint, display, processes)))
        _run(config, run, checkpoint, display, stop, processes)


def _run(
    config: Config, run: Path, checkpoint: Checkpoint | None, display: Display, stop: StopRequest, processes: Processes
) -> None:
    with stop.at_once(NOT_BEGUN):
        setup = _set_up(config, run, checkpoint, display, stop, processes)
        _check_same_start(setup)
    if checkpoint and setup.step >= setup.config.optim.steps:
        display.note(f"{run} has all its {setup.step} steps; raise --steps to go on")
        return
    if checkpoint:
        display.note(f"resuming from {checkpoint.path}, step {setup.step}")
        before = saved_config(checkpoint).schedule_steps
        if before != setup.config.schedule_steps:
            now = setup.config.schedule_steps
            display.note(
                f"the learning-rate schedule is now {now} steps long and was {before}; "
                f"--set optim.schedule_steps={before} keeps it"
            )
    unknown = describe_peak(setup.device, setup.dtype)
    if unknown:
        display.note(unknown)
    if setup.device.type == "cpu" and not is_small(setup.config) and (expected := _forecast(setup)):
        remark = _memory_remark(setup, expected)
        if remark:
            display.note(remark)
    before_this = processes.told("validation losses", lambda: json.dumps(validation_losses(run, setup.step)))
    patience = Patience(setup.config.run.patience, json.loads(before_this))
    if patience.over:
        display.note(f"{run} was stopped early: {patience.words()}; raise --set run.patience to go on")
        return
    if processes.first:
        check_space(run, setup)
    metrics = open_run(run, setup.config, setup.step) if processes.first else NoMetrics()
    try:
        display.start(make_plan(setup, run))
        train(setup, run, metrics, display, processes.agreed(stop), patience)
    finally:
        metrics.close()
        display.finish()


def dry_run(
    config: Config,
    run: Path,
    resume: str,
    display: Display,
    stop: StopRequest,
    foretold: Callable[[DryRun], None] = lambda known: None,
) -> DryRun:
    """Builds everything and tries it (see `DryRun`); writes nothing but a cache that it removes.

    `foretold` hears of the plan and the forecast before anything is tried, as the trial may use up the memory.
    """
    with (
        deterministic(config.run.deterministic),
        cpu_threads(config.run.threads),
        stop.at_once("stopped; nothing was written"),
        tempfile.TemporaryDirectory(prefix="cda-dry-run-") as cache,
    ):
        checkpoint = _find(run, resume, display, ALONE)
        setup = _set_up(config, run, checkpoint, display, stop, ALONE, spare_cache=Path(cache))
        plan, expected = make_plan(setup, run), _forecast(setup)
        fits = expected is None or _memory_remark(setup, expected) is None
        name = "Muon and AdamW" if setup.config.optim.optimizer == "muon" else "AdamW"
        known = DryRun(plan, None, name, expected, None, on_gpu=setup.device.type == "cuda")
        foretold(known)
        loss, peak = try_steps(setup) if fits else (None, None)
        return known._replace(loss=loss, peak=peak)


def _forecast(setup: Setup) -> Forecast | None:
    """None for the published code, which cannot be followed."""
    choice = resolve_backend(setup.config, setup.device)
    parts = setup.is_compiled, setup.graphs is not None, choice
    return forecast(setup.config, setup.device, setup.dtype, *parts) if choice.name != "colt5" else None


def _memory_remark(setup: Setup, expected: Forecast) -> str | None:
    # The weights are there already.
    left = available_memory() if setup.device.type == "cpu" else None
    return memory_remark(expected.peak - expected.weights, left)


def try_steps(setup: Setup) -> tuple[float, int]:
    """The loss of the first batch, and the peak of memory in bytes.

    On a GPU two whole steps, as only the second meets the optimizer's state, with up to two batches each, as only the
    second meets gradients.
    """
    if setup.device.type == "cpu":
        loss = accumulate_gradients(setup.compiled, draw(setup, 1)[0], setup.device, setup.dtype)
        return loss.item(), peak_memory(setup.device)
    torch.cuda.reset_peak_memory_stats(setup.device)
    optimizer = GuardedOptimizer(setup.optimizer)
    values = []
    for _ in range(2):
        batches, _ = draw(setup, min(2, setup.config.optim.grad_accum))
        loss = accumulate_gradients(setup.compiled, batches, setup.device, setup.dtype, graphs=setup.graphs)
        result = StepResult(loss, clip_gradients(setup.model, setup.config.optim.clip))
        optimizer.launch(result)
        values.append(result.read())
        optimizer.settle(values[-1].is_finite)
    return values[0].loss, peak_memory(setup.device)


def make_plan(setup: Setup, run: Path) -> Plan:
    config = setup.config
    optim, per_step = config.optim, config.optim.batch_size * config.optim.grad_accum
    windows = setup.data.windows
    return Plan(
        run=run,
        data=setup.data.description,
        parameters=setup.model.parameter_count(),
        device=describe_device(setup.device),
        dtype=str(setup.dtype).removeprefix("torch."),
        compiled=setup.is_compiled,
        cuda_graphs=setup.graphs is not None,
        backend=describe_backend(config, setup.device),
        first_step=setup.step,
        steps=optim.steps,
        tokens_per_step=per_step * config.model.seq_len,
        epochs=optim.steps * per_step / windows if windows else None,
        processes=f"{count}, {config.run.parallel}" if (count := setup.processes.count) > 1 else "1",
    )


def _threads(config: Config, checkpoint: Checkpoint | None, display: Display, processes: Processes) -> int | None:
    """CPU threads: those asked for, or else those that the run began with, since their number decides how sums are cut,
    and so the last bits."""
    begun = checkpoint.state.get(THREADS) if checkpoint else None
    if config.run.threads or processes.count > 1 or type(begun) is not int or not 1 <= begun <= MOST_THREADS:
        return config.run.threads
    here = torch.get_num_threads()
    if begun != here:
        display.note(
            f"the run goes on with {begun} CPU threads, as it began, for the same bits; --set run.threads={here} takes "
            f"the {here} of this process"
        )
    return begun


def _find(run: Path, resume: str, display: Display, processes: Processes) -> Checkpoint | None:
    """What the run goes on from. The first process looks for it, and the others take the same."""
    if not processes.first:
        path = processes.hear("checkpoint")
        return load(Path(path)) if path else None
    checkpoint, damaged = find_checkpoint(run, resume)
    for sentence in damaged:
        display.note(sentence)
    processes.say("checkpoint", str(checkpoint.path) if checkpoint else "")
    return checkpoint


def _check_same_start(setup: Setup) -> None:
    """Raises ConfigError where a machine sees another run folder than the first, or another text: it would train on, in
    vain."""
    text = f"{setup.data.windows} windows of text and {len(setup.data.validation)} validation tokens"
    text += f", data {digest(setup.data.identity)[:8]}"
    here = f"step {setup.step}, {text}"
    first = setup.processes.told("start", lambda: here)
    if here != first:
        raise ConfigError(
            f"the processes do not start from the same ({here} here, {first} in the first one); "
            "give all machines the same run folder and --data"
        )


def _set_up(
    config: Config,
    run: Path,
    checkpoint: Checkpoint | None,
    display: Display,
    stop: StopRequest,
    processes: Processes,
    spare_cache: Path | None = None,
) -> Setup:
    try:
        with processes.in_turn():
            data = open_data(
                config, show_progress=display.interactive, should_stop=lambda: bool(stop), spare_cache=spare_cache
            )
    except PreparationStoppedError as error:
        stop.check(str(error))
        raise
    config = with_vocabulary(with_absolute_paths(config), data)  # an error named them as they were given
    if checkpoint:
        known = checkpoint.state.get("data")  # None in a checkpoint of before it was kept
        check_same_run(with_absolute_paths(saved_config(checkpoint)), config, run, same_text=known == data.identity)
        check_same_text(known, data.identity, data.description, run)
    for sentence in [*config_warnings(config), *filter(None, [data.remark])]:
        display.note(sentence)
    return build(config, data, checkpoint, display.note, processes)
