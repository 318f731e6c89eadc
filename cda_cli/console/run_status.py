"""What is known of a run so far, and its words: the rows that the live view and the end of a run have in common."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cda_cli.console.base import count, duration, memory, plus_minus, share
from cda_cli.console.layer_table import range_words
from cda_cli.plurals import counted
from cda_cli.runs.records import HeadAlarm, Record, RefusedRecord, TrainRecord, ValidationRecord

if TYPE_CHECKING:
    from cda_cli.training.display import Plan

ALARMS = "heads"  # the name of their row
STATES = {"collapsed": "collapsed", "sink": "on the first key", "spread": "spread over all keys"}
MOST_NAMED = 6


@dataclass
class RunStatus:
    """`train` and `validation` are the latest records; `best` has the lowest validation loss.

    The losses are those of all records, oldest first. `elapsed` counts from the start of this process.
    """

    plan: Plan
    step: int
    train: TrainRecord | None = None
    validation: ValidationRecord | None = None
    best: ValidationRecord | None = None
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    is_stopping: bool = False
    _began: float = field(default_factory=time.monotonic)
    _end: float | None = None  # when the last step is expected to end

    def add(self, record: Record) -> None:
        match record:
            case TrainRecord():
                self.train = record
                self.losses.append(record.loss)
            case ValidationRecord():
                self.validation = record
                self.validation_losses.append(record.loss)
                if math.isfinite(record.loss) and (self.best is None or record.loss < self.best.loss):
                    self.best = record

    def advance(self, step: int, seconds_left: float | None) -> None:
        self.step = step
        self._end = None if seconds_left is None else time.monotonic() + seconds_left

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def seconds_left(self) -> float | None:
        """Counts down between two steps, which may be a minute apart."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def model_words(plan: Plan) -> str:
    model = plan.config.model
    heads = counted(model.heads, "head")
    if model.key_heads < model.heads:
        heads += f" on {counted(model.key_heads, 'key head')}"
    shape = f"{counted(model.depth, 'layer')} × {model.dim}, {heads}, context {model.seq_len}"
    return f"{shape}, {count(plan.parameters)} parameters"


def batch_words(plan: Plan) -> str:
    optim = plan.config.optim
    accumulated = f" × {optim.grad_accum}" if optim.grad_accum > 1 else ""
    return f"batch {optim.batch_size}{accumulated}, {optim.optimizer}, learning rate {optim.lr:g}"


def header_rows(plan: Plan) -> dict[str, str]:
    """What the header of the live view says too."""
    return {"model": model_words(plan), "training": batch_words(plan), "attention": plan.attention}


def plan_rows(plan: Plan) -> dict[str, str]:
    passes = "streamed"
    if plan.epochs is not None:
        passes = f"{f'{plan.epochs:.2f}' if plan.epochs >= 0.01 else 'under 0.01'} passes over the text"
    first = f"from step {plan.first_step} to {plan.steps}" if plan.first_step else f"{plan.steps}"
    processes = {"processes": plan.processes} if plan.processes != "1" else {}
    return {
        "run": str(plan.run),
        **({"preset": plan.config.preset} if plan.config.preset else {}),
        **processes,
        "data": plan.data,
        **header_rows(plan),
        "steps": f"{first}, of {count(plan.tokens_per_step)} tokens ({passes})",
        "device": ", ".join(
            [plan.device, plan.dtype, *["compiled"] * plan.compiled, *["CUDA graphs"] * plan.cuda_graphs]
        ),
        "operator": plan.backend,
    }


def metric_rows(status: RunStatus) -> dict[str, str]:
    """The latest metrics, the most important first. Empty before the first record of training."""
    train, validation, best = status.train, status.validation, status.best
    if train is None:
        return {}
    annealed = f", ε {train.eps:.3g}" if status.plan.config.model.eps_anneal_start is not None else ""
    rows = {
        "loss": f"{train.loss:.4f}, {train.bits_per_byte:.4f} bits per byte",
        "validation": _loss_words(validation) if validation else "–",
        "best": f"{best.loss:.4f} at step {best.step}" if best else "–",
        **({ALARMS: alarm_words(train.alarms)} if train.alarms else {}),
        "learning rate": f"{train.lr:.2e}, gradient norm {train.grad_norm:.2f}{annealed}",
        **({"auxiliary": ", ".join(words)} if (words := auxiliary_words(train)) else {}),
        "speed": f"{count(train.tokens_per_second)} tokens/s, waiting for data {share(train.data_wait)} of a step",
        "tokens": f"{count(train.tokens)}, memory {memory(train.memory_bytes)}",
    }
    if best and validation and best is not validation:
        rows["best"] += f"; the last validation was at step {validation.step}"
    if validation and validation.ema_loss is not None:
        rows["averaged"] = f"validation {validation.ema_loss:.4f} with the averaged weights"
    if train.mfu_computed is not None and train.mfu_dense is not None:
        # One number without its rule could be either.
        computed, dense = share(train.mfu_computed), share(train.mfu_dense)
        rows["utilisation"] = f"{computed} of the FLOPs computed, {dense} of a dense model's (6N + 12LdT)"
    return rows


def auxiliary_words(train: TrainRecord) -> list[str]:
    """What the auxiliary losses of a run have measured; empty where it has none."""
    words = [] if train.ff_l1 is None else [f"L1 norm {train.ff_l1:.4g}"]
    if train.support is not None and train.support_multiplier is not None:
        words += [f"mean support {train.support:.2f}", f"multiplier {train.support_multiplier:.3g}"]
    return words


def alarm_words(alarms: Sequence[HeadAlarm]) -> str:
    """The heads that have stopped to select, by what they do instead, at most MOST_NAMED of each."""
    parts = []
    for state, words in STATES.items():
        if heads := [f"{alarm.layer}.{alarm.head}" for alarm in alarms if alarm.state == state]:
            more = f" and {len(heads) - MOST_NAMED} more" if len(heads) > MOST_NAMED else ""
            parts.append(f"{words} {', '.join(heads[:MOST_NAMED])}{more}")
    return "; ".join(parts)


def validated_on(plan: Plan, validation: ValidationRecord) -> str:
    """Says which part of the validation text was used, and so why `cda eval` comes to another loss."""
    seen, all_windows = validation.windows, plan.validation_windows
    if all_windows is None:
        return f"the first {counted(seen, 'window')} of the stream; cda eval takes another number of them"
    if seen < all_windows:
        return f"the first {seen:,} of {counted(all_windows, 'window')}; cda eval takes them all, so its loss differs"
    return f"all {counted(all_windows, 'window')}, as in cda eval"


def train_words(record: TrainRecord, has_budget: bool, dash: str = "–") -> tuple[list[str], list[str]]:
    """The parts of two plain lines: training, then resources and layers.

    Each measure of the layers is given as its lowest and its highest value.
    """
    training = [
        f"loss {record.loss:.4f}",
        f"{record.bits_per_byte:.3f} bits/byte",
        f"lr {record.lr:.2e}",
        f"gradient {record.grad_norm:.2f}",
        *auxiliary_words(record),
        f"{count(record.tokens_per_second)} tokens/s",
        f"{duration(record.seconds_left)} left",
    ]
    rest = [f"data wait {share(record.data_wait)}", memory(record.memory_bytes)]
    if record.mfu_computed is not None and record.mfu_dense is not None:
        rest.append(f"MFU {share(record.mfu_computed)} computed, {share(record.mfu_dense)} dense")
    return training, [*rest, *range_words(record.layers, has_budget, dash)]


def validation_words(record: ValidationRecord) -> str:
    averaged = "" if record.ema_loss is None else f"; averaged weights {record.ema_loss:.4f}"
    return f"loss {_loss_words(record)}{averaged}"


def refused_words(record: RefusedRecord) -> str:
    return (
        f"refused: {record.saw}; the weights stay as they were, and the step is tried with the next batch "
        f"({record.in_a_row} in a row)"
    )


def next_commands(status: RunStatus) -> list[str]:
    """What one would run next, once a run has ended and saved its last step; a stop tells by itself how to go on."""
    if status.is_stopping and status.step < status.plan.steps:
        return []
    run, prompt = shlex.quote(str(status.plan.run)), status.plan.prompt
    sample = [f'cda sample {run} --prompt "{prompt}"'] if prompt else []
    return [f"cda eval {run}", *sample, f"cda inspect-sparsity {run}"]


def _loss_words(record: ValidationRecord) -> str:
    return f"{plus_minus(record.loss, record.standard_error)}, {record.bits_per_byte:.4f} bits per byte"
