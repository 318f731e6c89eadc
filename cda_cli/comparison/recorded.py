"""What a run recorded of itself: its loss over tokens and time, its speed, memory and text. No model is loaded."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cda_cli.config import Config
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.plurals import counted
from cda_cli.runs.folder import Run
from cda_cli.runs.records import InitRecord, LayerRecord, TrainRecord, ValidationRecord
from cda_cli.runs.summary import Summary, summarise
from cda_cli.storage import STATE_FILE, load

MOST_RUNS = 6
MOST_POINTS = 1000  # train records of a curve


class Point(NamedTuple):
    """A loss during training, nats per token, after so many steps, tokens and seconds.

    `ema_loss` is that of the averaged weights; NaN where there are none.
    """

    step: float
    tokens: float
    seconds: float
    loss: float
    bits_per_byte: float
    ema_loss: float = math.nan


@dataclass(frozen=True)
class RecordedRun:
    """The records of a run. A figure that it has none of is NaN.

    `training` and `validation` are its losses, oldest first, and `validated` says how much text its newest validation
    had, or is empty. Seconds are those of training steps, by their recorded speed: pauses to validate or save are not
    among them. `layers` are those of the newest train record. `text` is the identity of the text and its tokens, by the
    newest checkpoint that can be read, or None. `began_from` tells the weights that it began from, if they were not
    random.
    """

    summary: Summary
    config: Config
    training: Sequence[Point]
    validation: Sequence[Point]
    validated: str
    layers: Sequence[LayerRecord]
    tokens_per_second: float
    memory_bytes: float
    text: Mapping[str, Any] | None
    began_from: str | None

    @property
    def path(self) -> Path:
        return self.summary.path

    @property
    def tokens(self) -> float:
        """Tokens that it was trained on."""
        return self.training[-1].tokens if self.training else math.nan

    @property
    def seconds(self) -> float:
        return self.training[-1].seconds if self.training else math.nan

    @property
    def scheduled_tokens(self) -> float:
        """Tokens after which its learning-rate schedule ends."""
        optim = self.config.optim
        of_step: float = optim.batch_size * optim.grad_accum * self.config.model.seq_len
        if self.training:
            of_step = self.training[-1].tokens / self.training[-1].step
        return self.config.schedule_steps * of_step


def have_one_tokenizer(runs: Sequence[RecordedRun]) -> bool:
    """Says so by the fingerprints in their checkpoints, or where a run has none, by the settings of all."""
    fingerprints = {run.text.get("tokenizer") if run.text else None for run in runs}
    if None not in fingerprints:
        return len(fingerprints) == 1
    return len({(run.config.data.tokenizer, run.config.data.bos, run.config.data.eos) for run in runs}) == 1


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """Reads each run. Raises ConfigError for what is no run, for a run that is named twice, and for one or too many."""
    if not 2 <= len(paths) <= MOST_RUNS:
        raise ConfigError(f"{counted(len(paths), 'run was', 'runs were')} given; give from two to {MOST_RUNS}")
    places = [path.resolve() for path in paths]
    for number, path in enumerate(paths):
        if places[number] in places[:number]:
            raise ConfigError(f"{path} is given twice; name each run once")
    return [read_run(path) for path in paths]


def read_run(path: Path) -> RecordedRun:
    """Raises ConfigError where `path` is no run."""
    _check(path)
    run = Run(path)
    config, summary = run.config(), summarise(path)
    assert config is not None, "_check has looked for it"
    records = list(run.records(TrainRecord, most=MOST_POINTS))
    for newest in run.records(TrainRecord, newest_first=True, most=1):
        if not records or records[-1].step < newest.step:
            records.append(newest)
    first = next(run.records(InitRecord), None)
    steps, tokens, seconds = _clock(records, first.step if first else 0)
    validations = list(run.records(ValidationRecord))
    speeds = [record.tokens_per_second for record in records if record.tokens_per_second > 0]
    return RecordedRun(
        summary=summary,
        config=config,
        training=[
            Point(record.step, record.tokens, second, record.loss, record.bits_per_byte)
            for record, second in zip(records, seconds[1:], strict=True)
        ],
        validation=[
            Point(
                each.step,
                interpolate(each.step, steps, tokens),
                interpolate(each.step, steps, seconds),
                each.loss,
                each.bits_per_byte,
                math.nan if each.ema_loss is None else each.ema_loss,
            )
            for each in validations
            if each.step <= steps[-1]  # The tokens of a later one are not recorded yet.
        ],
        validated=_amount(validations[-1]) if validations else "",
        layers=records[-1].layers if records else (),
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        memory_bytes=max((record.memory_bytes for record in records), default=math.nan),
        text=_text(run),
        began_from=f"{first.file} of step {first.from_step}, {first.sha256[:12]}" if first else None,
    )


def _check(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give the folder of a run")
    if (path / STATE_FILE).exists():
        raise ConfigError(f"{path} is a checkpoint; give its run, or compare checkpoints with `cda eval`")
    if Run(path).config() is None:
        raise ConfigError(f"{path} holds no run; give the folder that `cda train --out` names")


def _clock(records: Sequence[TrainRecord], begun: int) -> tuple[list[float], list[float], list[float]]:
    """Steps, tokens and seconds at the start and at each record, from the speeds that the records have.

    A record without a speed takes that of the record before. A fork has `begun` with steps of another run, whose tokens
    it counts and whose seconds it does not.
    """
    before = records[0].tokens * begun / records[0].step if records else 0.0
    steps, tokens, seconds, speed = [float(begun)], [before], [0.0], math.nan
    for record in records:
        if record.tokens_per_second > 0:
            speed = record.tokens_per_second
        steps.append(record.step)
        seconds.append(seconds[-1] + (record.tokens - tokens[-1]) / speed)
        tokens.append(record.tokens)
    return steps, tokens, seconds


def interpolate(x: float, places: Sequence[float], values: Sequence[float]) -> float:
    """The value at `x` between `places`, which grow; NaN outside of them."""
    after = bisect_left(places, x)
    if after == len(places) or (after == 0 and places[0] != x):
        return math.nan
    if places[after] == x:
        return values[after]
    share = (x - places[after - 1]) / (places[after] - places[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def _amount(validation: ValidationRecord) -> str:
    if validation.text_bytes is None:
        return f"{validation.tokens:,} tokens"
    return f"{validation.text_bytes:,} bytes"


def _text(run: Run) -> Mapping[str, Any] | None:
    for checkpoint in reversed(run.checkpoints()):
        try:
            text = load(checkpoint, parts=()).state.get("data")
        except CheckpointError:
            continue
        return text if isinstance(text, dict) else None
    return None
