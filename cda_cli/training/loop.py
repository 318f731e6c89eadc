"""The training loop, top to bottom.

batches → loss → gradients → clip → step → figures; now and then validate, sample, save. A request to stop is answered
after the step in hand, by saving.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Protocol

import torch

from cda_cli.config import annealed_eps
from cda_cli.data import IGNORE, Batch, evaluation_batches
from cda_cli.evaluation import Evaluation, bits_per_byte, evaluate
from cda_cli.generation import SamplingSettings, generate
from cda_cli.runtime import peak_memory
from cda_cli.signals import StopRequest
from cda_cli.storage import publish, step_folder
from cda_cli.training.finite import Refusals, StepResult
from cda_cli.training.gradients import clip_gradients
from cda_cli.training.milestones import Minutes, Patience, due
from cda_cli.training.optimizer import GuardedOptimizer, learning_rate, set_learning_rate
from cda_cli.training.pipeline import Pipeline, restore_gc
from cda_cli.training.run_folder import Metrics
from cda_cli.training.setup import Setup
from cda_cli.training.speed import Speed

SAMPLE_TOKENS = 200


class Display(Protocol):
    """What shows a run to a person. `interactive`: stderr is a terminal, so progress may be drawn on it."""

    interactive: bool

    def start(self, plan: Any) -> None:
        """The first step is about to be taken; `plan` is a `training.run.Plan`."""

    def advance(self, step: int) -> None:
        """A step is done."""

    def show(self, record: dict[str, Any]) -> None:
        """A record, as it goes into metrics.jsonl; its `kind` is train, refused, validation, sample or checkpoint."""

    def note(self, text: str) -> None:
        """A sentence."""

    def finish(self) -> None:
        """No more steps come, for whatever reason."""


@restore_gc()
def train(setup: Setup, run: Path, metrics: Metrics, display: Display, stop: StopRequest, patience: Patience) -> None:
    """Trains from `setup.step` to `optim.steps`, or until `patience` is over.

    Raises InterruptedRunError, after saving, when asked to stop.
    """
    optim, every = setup.config.optim, setup.config.run
    model, processes = setup.model, setup.processes
    optimizer = GuardedOptimizer(setup.optimizer, lambda: processes.gather_ahead(setup.compiled))
    speed = Speed()
    pipeline = Pipeline(setup, speed, optimizer.steps_at_launch)
    since = Since()  # the last line of figures
    minutes, refusals = Minutes(every.save_minutes), Refusals(run, optim.max_refused)
    saved = setup.step if setup.position is not None else None

    def record(kind: str, **figures: Any) -> None:
        line = {"step": setup.step, "kind": kind, **figures}
        metrics.write(line)
        display.show(line)

    def is_logged(step: int) -> bool:
        return due(step, every.log_every) or step == optim.steps

    model.train()
    while setup.step < optim.steps and not (stop or patience.over):
        rate = learning_rate(optim, setup.config.schedule_steps, setup.step)
        set_learning_rate(setup.optimizer, rate)
        eps = annealed_eps(setup.config.model, setup.step, setup.config.schedule_steps)
        model.set_attention_eps(eps)
        batches, setup.position, loss = pipeline.take()
        result = StepResult(loss, clip_gradients(model, optim.clip))
        optimizer.launch(result)
        pipeline.prefetch(batches, inspects=is_logged(setup.step + 1))
        stop.agree()
        values = result.read()
        optimizer.settle(values.is_finite)
        refusals.add(values)
        if not values.is_finite:
            record("refused", **refusals.record(setup.step + 1))
            refusals.check(setup.step + 1)
            continue
        setup.step += 1
        pipeline.step_taken()
        if setup.average:
            setup.average.update(setup.step)
        setup.validation_loss = None
        tokens = sum(batch.inputs.numel() for batch in batches)
        setup.tokens += tokens
        since.add(values.loss, batches)
        speed.add(tokens)
        display.advance(setup.step)

        last = setup.step == optim.steps
        if is_logged(setup.step) or stop:
            speed.mark()
            layers = pipeline.layers(batches)
            record(
                "train",
                **since.figures(),
                lr=rate,
                eps=eps,
                grad_norm=values.norm,
                tokens=setup.tokens,
                tokens_per_second=speed.tokens_per_second,
                seconds_left=speed.seconds_left(optim.steps - setup.step),
                data_wait=speed.data_wait,
                **setup.utilisation(speed.tokens_per_second),
                memory_bytes=peak_memory(setup.device),
                layers=layers,
            )
            since = Since()
        passed = every.save_minutes > 0 and processes.any(minutes.passed())
        with speed.paused():
            # Validation and samples have the ε that the checkpoint of this step is restored with.
            model.set_attention_eps(annealed_eps(setup.config.model, setup.step, setup.config.schedule_steps))
            if (due(setup.step, every.eval_every) or last) and not stop:
                found = validate(setup, stop)
                if found is not None:
                    record("validation", **found._asdict(), **averaged_figures(setup, stop))
                    setup.validation_loss = processes.of_first(found.loss)
                    patience.add(setup.validation_loss)
            if due(setup.step, every.sample_every) and not stop:
                record("sample", text=sample(setup, stop))
            if due(setup.step, every.save_every) or passed or last or stop or patience.over:
                path = save(setup, run)
                saved = setup.step
                minutes.restart()
                record("checkpoint", path=str(path))
    if patience.over and setup.step < optim.steps:
        display.note(f"stopped early at step {setup.step} of {optim.steps}: {patience.words()}")
    if stop:
        if saved != setup.step:
            save(setup, run)
        stop.check(f"stopped at step {setup.step} of {optim.steps}, and saved; the same command goes on from there")


class Since:
    """The losses since the last line of figures, and what they were taken over."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._nats, self._bytes = 0.0, 0

    def add(self, loss: float, batches: list[Batch]) -> None:
        """A step: its mean loss over the targets of `batches`."""
        self._losses.append(loss)
        self._nats += loss * sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        self._bytes += sum(int(batch.target_bytes.sum()) for batch in batches)

    def figures(self) -> dict[str, float]:
        """The mean of the losses, and all of them spread over the bytes of their text."""
        return {"loss": statistics.fmean(self._losses), "bits_per_byte": bits_per_byte(self._nats, self._bytes)}


def save(setup: Setup, run: Path) -> Path:
    """Publishes a checkpoint of this moment, and returns its folder."""
    contents = setup.publishable()
    if setup.processes.first:
        publish(run, **contents)
    setup.processes.wait()
    return step_folder(run, setup.step)


def validate(setup: Setup, stop: StopRequest) -> Evaluation | None:
    """Figures on the first `eval_batches` batches of the validation split, or None where a stop cut them short."""
    config, validation = setup.config, setup.data.validation
    batches = evaluation_batches(
        validation, config.model.seq_len, config.optim.batch_size, max_batches=config.run.eval_batches
    )
    result = evaluate(setup.compiled, stop.until(batches), setup.device, setup.dtype)
    return None if stop else result


def averaged_figures(setup: Setup, stop: StopRequest) -> dict[str, float]:
    """The same figures of the averaged weights, where there are any."""
    if setup.average is None:
        return {}
    with setup.average.in_place():
        result = validate(setup, stop)
    return {f"ema_{name}": getattr(result, name) for name in ("loss", "bits_per_byte")} if result else {}


def sample(setup: Setup, stop: StopRequest) -> str:
    """Text that follows the beginning of the validation split, until a stop; same step, same text."""
    tokenizer, prompt_tokens = setup.data.tokenizer, min(64, setup.config.model.seq_len // 2)
    prompt = [int(token) for token in setup.data.validation.ids[:prompt_tokens]]
    setup.model.eval()
    seed, settings = setup.config.run.seed, SamplingSettings()
    with torch.compiler.set_stance("force_eager"):
        tokens = list(stop.until(generate(setup.model, prompt, SAMPLE_TOKENS, settings, seed=seed, dtype=setup.dtype)))
    setup.model.train()
    decoder = tokenizer.stream()  # one for both: the text of a token may depend on the tokens before it
    before, after = ("".join(map(decoder.push, part)) for part in (prompt, tokens))
    return f"{before}▸{after}{decoder.flush()}"
