"""The training loop, top to bottom.

batches → loss → gradients → clip → step → metrics; now and then validate, sample, save. After a request to stop, the
loop finishes the current step and saves.
"""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path

import torch

from cda_cli.config import Config
from cda_cli.data import Batch, evaluation_batches
from cda_cli.evaluation import Evaluation, bits_per_byte, evaluate
from cda_cli.generation import SamplingSettings, generate
from cda_cli.runs.early_stop import Patience
from cda_cli.runs.folder import Run
from cda_cli.runs.metrics import Metrics
from cda_cli.runs.records import CheckpointRecord, Record, SampleRecord, TrainRecord, ValidationRecord
from cda_cli.runtime import peak_memory
from cda_cli.signals import StopRequest
from cda_cli.storage import publish
from cda_cli.training.accounting.speed import Speed
from cda_cli.training.display import Display
from cda_cli.training.distributed.processes import Processes
from cda_cli.training.gradients import clip_gradients, count_targets
from cda_cli.training.nonfinite import Refusals, StepResult
from cda_cli.training.optimizer import GuardedOptimizer, learning_rate, set_learning_rate
from cda_cli.training.pipeline import Pipeline, eps_of_step, restore_gc
from cda_cli.training.schedule import Timer, due
from cda_cli.training.state import RunContext, TrainState


@restore_gc()
def train(
    context: RunContext,
    state: TrainState,
    run: Run,
    metrics: Metrics,
    display: Display,
    stop: StopRequest,
    patience: Patience,
    owes_validation: bool = False,
) -> None:
    """Trains from `state.step` to `optim.steps`, or until `patience` is over.

    With `owes_validation` it first makes that of `state.step`, which a stop cut short.

    Raises InterruptedRunError, after saving, when asked to stop.
    """
    config, processes, model = context.config, context.processes, state.model
    optim, every = config.optim, config.run
    optimizer = GuardedOptimizer(state.optimizer, lambda: processes.gather_ahead(context.compiled))
    tokens = optim.batch_size * optim.grad_accum * config.model.seq_len  # of a step
    speed = Speed()
    pipeline = Pipeline(context, state, speed, optimizer.steps_at_launch)
    running = RunningLoss()
    timer, refusals = Timer(every.save_minutes), Refusals(run, optim.max_refused)
    saved = state.step if state.position is not None else None

    def report(record: Record) -> None:
        metrics.write(record)
        display.show(record)

    def is_logged(step: int) -> bool:
        return due(step, every.log_every) or step == optim.steps

    def report_validation() -> None:
        record = validate(context, state, stop)
        if record is not None:
            report(record)
            state.validation_loss = processes.broadcast_value(record.loss)
            patience.add(state.validation_loss)

    if owes_validation:
        model.set_attention_eps(eps_of_step(config, state.step))
        report_validation()
    model.train()
    while state.step < optim.steps and not (stop or patience.over):
        rate = learning_rate(optim, config.schedule_steps, state.step)
        set_learning_rate(state.optimizer, rate)
        pending = pipeline.take()
        batches, state.position = pending.batches, pending.position
        result = StepResult(pending.loss, clip_gradients(model, optim.clip), pending.measured)
        optimizer.launch(result)
        state.auxiliary.ascend(result)
        pipeline.prefetch(batches, inspects=is_logged(state.step + 1))
        stop.agree()
        values = result.read()
        optimizer.settle(values.is_finite)
        refusals.add(values)
        if not values.is_finite:
            report(refusals.record(state.step + 1))
            refusals.check(state.step + 1)
            continue
        state.step += 1
        pipeline.step_taken()
        if state.average:
            state.average.update(state.step)
        state.validation_loss = None
        state.tokens += tokens
        running.add(values.loss, batches)
        speed.add(tokens)
        display.advance(state.step, speed.seconds_left(optim.steps - state.step))

        last = state.step == optim.steps
        if is_logged(state.step) or stop:
            speed.mark()
            recorded = pipeline.recorded(batches, pending.attention.eps)
            nats, text_bytes = running.totals(processes)
            report(
                TrainRecord(
                    step=state.step,
                    loss=running.loss,
                    bits_per_byte=bits_per_byte(nats, text_bytes),
                    lr=rate,
                    eps=pending.attention.eps,
                    grad_norm=values.norm,
                    **values.measured,
                    tokens=state.tokens,
                    tokens_per_second=speed.tokens_per_second,
                    seconds_left=speed.seconds_left(optim.steps - state.step),
                    data_wait=speed.data_wait,
                    **context.utilisation(speed.tokens_per_second),
                    memory_bytes=peak_memory(context.device),
                    layers=recorded.layers,
                    # At first all heads read as random weights make them.
                    alarms=recorded.alarms if state.step > optim.warmup_steps else (),
                )
            )
            running = RunningLoss()
        passed = every.save_minutes > 0 and processes.any(timer.has_passed())
        with speed.paused():
            # Validation and samples use the ε that a model restored from this step's checkpoint has.
            model.set_attention_eps(eps_of_step(config, state.step))
            if validation_due(config, state.step) and not stop:
                report_validation()
            if due(state.step, every.sample_every) and not stop:
                report(SampleRecord(step=state.step, text=sample(context, state, stop)))
            if due(state.step, every.save_every) or passed or last or stop or patience.over:
                path = save(context, state, run)
                saved = state.step
                timer.restart()
                report(CheckpointRecord(step=state.step, path=str(path)))
    if patience.over and state.step < optim.steps:
        display.note(f"stopped early at step {state.step} of {optim.steps}: {patience.words()}")
    if stop:
        if saved != state.step:
            save(context, state, run)
        stopped = f"stopped at step {state.step} of {optim.steps}, and saved"
        has_more = state.step < optim.steps or state.validation_loss is None
        if has_more and not patience.over:
            # The settings of a run do not say how many processes there were.
            alone = processes.count == 1
            command = f"`cda train --out {shlex.quote(str(run.path))}`" if alone else "the same command"
            stopped += f"; {command} goes on from there"
        stop.check(stopped)


class RunningLoss:
    """The losses since the last train record, and what they were taken over."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._targets: list[int] = []  # of each step, those of this process
        self._bytes = 0

    def add(self, loss: float, batches: list[Batch]) -> None:
        """A step: its mean loss over the targets of all processes, and the `batches` of this one."""
        self._losses.append(loss)
        self._targets.append(sum(map(count_targets, batches)))
        self._bytes += sum(int(batch.target_bytes.sum()) for batch in batches)

    @property
    def loss(self) -> float:
        """Mean of the losses, nats per token."""
        return statistics.fmean(self._losses)

    def totals(self, processes: Processes) -> tuple[float, int]:
        """All the losses, in nats, and the bytes of their text. It waits for all processes."""
        of_groups = processes.gather([*self._targets, self._bytes])[:: processes.mesh.parts]
        *targets, text_bytes = map(sum, zip(*of_groups, strict=True))
        return sum(loss * count for loss, count in zip(self._losses, targets, strict=True)), text_bytes


def save(context: RunContext, state: TrainState, run: Run) -> Path:
    """Publishes a checkpoint of this moment, and returns its folder."""
    contents, retention, processes = state.checkpoint(context), context.config.run, context.processes
    path = publish(run.path, **contents._asdict(), keep=retention.keep, keep_best=retention.keep_best, group=processes)
    processes.wait()
    return path


def validation_due(config: Config, step: int) -> bool:
    """Whether a validation is due after `step`."""
    return due(step, config.run.eval_every) or step == config.optim.steps


def validate(context: RunContext, state: TrainState, stop: StopRequest) -> ValidationRecord | None:
    """Evaluates the weights, and their average if there is one; None if a stop cut that short."""
    found = evaluate_validation(context, stop)
    averaged = {}
    if found is not None and state.average is not None:
        with state.average.in_place():
            result = evaluate_validation(context, stop)
        if result is None:
            return None
        averaged = {"ema_loss": result.loss, "ema_bits_per_byte": result.bits_per_byte}
    return ValidationRecord(step=state.step, **(found._asdict() | averaged)) if found is not None else None


def evaluate_validation(context: RunContext, stop: StopRequest) -> Evaluation | None:
    """Evaluates the first `eval_batches` batches of the validation split; None if a stop cut that short."""
    config, validation = context.config, context.data.validation
    batches = evaluation_batches(
        validation, config.model.seq_len, config.optim.batch_size, max_batches=config.run.eval_batches
    )
    result = evaluate(context.compiled, stop.until(batches), context.device, context.dtype)
    return None if stop else result


def sample(context: RunContext, state: TrainState, stop: StopRequest) -> str:
    """Generates text that follows the beginning of the validation split, or the first prompt of a task, until a stop.

    The same weights give the same text.
    """
    config, data = context.config, context.data
    end, is_target = min(64, config.model.seq_len // 2), data.validation.is_target
    prompt = [int(token) for token in data.validation.ids[: end if is_target is None else int(is_target.argmax())]]
    state.model.eval()
    settings = SamplingSettings()
    with torch.compiler.set_stance("force_eager"):
        generated = generate(
            state.model, prompt, config.run.sample_tokens, settings, seed=config.run.seed, dtype=context.dtype
        )
        tokens = list(stop.until(generated))
    state.model.train()
    # One decoder for prompt and text, as the text of a token may depend on the tokens before it.
    decoder = data.tokenizer.stream()
    before, after = ("".join(map(decoder.push, part)) for part in (prompt, tokens))
    return f"{before}▸{after}{decoder.flush()}"
