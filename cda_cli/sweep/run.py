"""Runs a whole sweep."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from cda_cli.config import Config
from cda_cli.errors import CdaError, ConfigError, DeviceError
from cda_cli.signals import StopRequest
from cda_cli.storage import holds_run, only_writer
from cda_cli.sweep import attempts
from cda_cli.sweep.claims import register
from cda_cli.sweep.jobs import Display, Runner, Slot
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.spec import EVALUATED, settings

LOCKED = ".sweep"  # a hidden folder in that of the sweep, which is no run, and so has no lock of its own

# The metric of a task or of a cut, and the name of that.
PART = re.compile(rf"{re.escape(EVALUATED)}(?:tasks\.(.+)\.metrics\.|([\w-]+\[\d+\])\.)")


def run_sweep(sweep: Sweep, slots: Sequence[Slot], display: Display) -> None:
    """Trains what is missing.

    Raises InterruptedRunError once it was stopped, and StorageError if another process runs this sweep.
    """
    with StopRequest() as stop, only_writer(sweep.out / LOCKED, lambda _: None):
        register(sweep.spec, sweep.out)
        runner = Runner(slots, sweep.out, display, stop, attempts.machine(), attempts.commit(), attempts.versions())
        for jobs in sweep.stages():
            runner.run(jobs, sweep.runs())
            stop.check("stopped, and what was running is saved; the same command goes on")


def check_machine(sweep: Sweep, slots: Sequence[Slot]) -> None:
    """Raises ConfigError, before anything is trained, for a device or a text that this machine does not have."""
    _require_devices(slots)
    _require_texts(sweep)


def _require_devices(slots: Sequence[Slot]) -> None:
    if devices := {slot.device for slot in slots if slot.device}:
        from cda_cli.runtime import pick_device

        for device in sorted(devices):
            try:
                pick_device(device)
            except DeviceError as error:
                missing = str(error).partition(";")[0]
                raise ConfigError(
                    f"--devices: {missing}; give those of this machine, or leave --devices out"
                ) from error


def _require_texts(sweep: Sweep) -> None:
    """Raises ConfigError where the text of a run that is missing is not there: all runs would fail, one by one."""
    from cda_cli.data import is_there

    texts = {job.config.data.source for job in sweep.runs() if not job.is_done()}
    wants = sweep.spec.eval
    if wants and wants.data and (texts or not all(job.is_done() for job in sweep.evaluations())):
        texts.add(wants.data)
    for text in sorted(texts):
        if not is_there(text):
            raise ConfigError(f"{sweep.file}: there is no text {text}; name one that is there, as by --set data.source")


def check_sweep(sweep: Sweep) -> None:
    """Raises ConfigError, before anything is trained, for what could not come to a result."""
    _require_own_folder(sweep)
    sweep.check(count_parameters)
    wants, measured = sweep.spec.eval, dict[str, None]()  # names, in the order of the file
    if wants and wants.cut:
        from cda_cli.causal import Wanted

        try:
            measured |= dict.fromkeys(cut.name for cut in Wanted.parse(wants.cut, (), ()).interventions)
        except ConfigError as error:
            raise ConfigError(f"{sweep.file}: eval.cut: {error}") from error
    if wants and wants.tasks:
        from cda_cli.evaluation.tasks import TaskOptions, find_tasks
        from cda_cli.restore import own_task

        try:
            for arm in sweep.spec.arms:
                own = own_task(settings(sweep.spec, *sweep.spec.layers(arm)))
                found = find_tasks(wants.tasks, TaskOptions(limit=wants.limit, lengths=wants.lengths, own=own))
                measured |= dict.fromkeys((*found.tasks, *found.summaries))
        except CdaError as error:
            raise ConfigError(f"{sweep.file}: eval.tasks: {error}") from error
    _require_measured(sweep, measured)


def _require_own_folder(sweep: Sweep) -> None:
    """Raises ConfigError where the folder is that of a run, or of a sweep that shares no arm with the file."""
    if sweep.out.is_dir() and holds_run({entry.name for entry in sweep.out.iterdir()}):
        raise ConfigError(f"{sweep.out} is the folder of a run; choose another --out")
    held = dict.fromkeys(attempt.arm for attempt in attempts.read(sweep.out))
    if held and held.keys().isdisjoint({*sweep.spec.arms, *sweep.spec.trunks}):
        raise ConfigError(f"{sweep.out} has the runs of another sweep ({', '.join(held)}); choose another --out")


def _require_measured(sweep: Sweep, measured: Collection[str]) -> None:
    """Raises ConfigError where the file names a metric of a cut or a task that is none of those `measured`.

    It names all of these: among numbers, the one that is written most alike is not the one that was meant.
    """
    for key, metric in sweep.spec.metrics_named():
        found = PART.match(metric)
        if found and (part := found[1] or found[2]) not in measured:
            known = f"name one of {', '.join(measured)}" if measured else "it has no cut and no task; add it there"
            raise ConfigError(f"{sweep.file}: {key}: eval does not measure {part!r}, of the metric {metric!r}; {known}")


def count_parameters(config: Config) -> int:
    """Counts the weights of the model of a configuration, without making them."""
    from cda_cli.model import model_of_shapes

    return model_of_shapes(config.model).parameter_count()
