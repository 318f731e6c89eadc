"""Shows a training run: live on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cda_cli.console.base import count, duration, is_live, memory, out, pairs, plus_minus, share, shows_progress, table
from cda_cli.console.text import printable, write_text
from cda_cli.runs.records import (
    CheckpointRecord,
    LayerRecord,
    Record,
    RefusedRecord,
    SampleRecord,
    TrainRecord,
    ValidationRecord,
)

if TYPE_CHECKING:
    from cda_cli.training.display import Plan


class TrainingDisplay:
    """The `training.display.Display` of a run."""

    def __init__(self) -> None:
        self._console = out()
        self.interactive = shows_progress()
        self._is_live = is_live(self._console)
        self._steps = 0
        self._train: TrainRecord | None = None  # the latest one
        self._validation: ValidationRecord | None = None
        self._bar = Progress(TextColumn("step"), BarColumn(bar_width=None), MofNCompleteColumn(), expand=True)
        self._task = self._bar.add_task("step", total=None)
        self._live = Live(console=self._console, get_renderable=self._view, refresh_per_second=4, transient=True)

    def start(self, plan: Plan) -> None:
        self._steps = plan.steps
        self._console.print(pairs(plan_rows(plan)))
        self._console.print()
        self._bar.update(self._task, total=plan.steps, completed=plan.first_step)
        if self._is_live:
            self._live.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, record: Record) -> None:
        match record:
            case TrainRecord():
                self._train = record
                if not self._is_live:
                    self._line(record, train_words(record))
            case RefusedRecord():
                self._line(record, Text(refused_words(record), style="yellow"))
            case ValidationRecord():
                self._validation = record
                self._line(record, Text(f"validation {validation_words(record)}", style="bold"))
            case SampleRecord():
                self._line(record, Text("sample", style="bold"))
                # Masked off a terminal too: a log is read on one later, and metrics.jsonl has the text itself.
                write_text(self._console, printable(record.text) + "\n", style="cyan")
            case CheckpointRecord():
                self._line(record, f"saved {record.path}")

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def finish(self) -> None:
        """Leaves the latest records as a table."""
        self._live.stop()
        if self._train:
            self._console.print()
            self._console.print(self._table(self._train))
            self._console.print()
            self._console.print(layer_table(self._train.layers))

    def _line(self, record: Record, words: str | Text) -> None:
        width = len(str(self._steps))
        self._console.print(Text.assemble((f"{record.step:>{width}}/{self._steps}  ", "dim"), words), soft_wrap=True)

    def _view(self) -> Group | Progress:
        if not self._train:
            return self._bar
        return Group("", self._table(self._train), "", layer_table(self._train.layers), "", self._bar)

    def _table(self, train: TrainRecord) -> Table:
        validation = self._validation
        rows = {
            "step": f"{train.step} of {self._steps}",
            "loss": f"{train.loss:.4f}  ({train.bits_per_byte:.4f} bits per byte)",
            "validation": f"{validation_words(validation)} at step {validation.step}" if validation else "–",
            "learning rate": f"{train.lr:.2e}, gradient norm {train.grad_norm:.2f}",
            "speed": f"{count(train.tokens_per_second)} tokens/s, {duration(train.seconds_left)} left",
            **utilisation_rows(train),
            "waiting for data": f"{share(train.data_wait)} of a step",
            "tokens": count(train.tokens),
            "memory": memory(train.memory_bytes),
        }
        return pairs(rows)


def plan_rows(plan: Plan) -> dict[str, str]:
    passes = "streamed" if plan.epochs is None else f"{plan.epochs:.2f} passes over the text"
    first = f"from step {plan.first_step} to {plan.steps}" if plan.first_step else f"{plan.steps}"
    processes = {"processes": plan.processes} if plan.processes != "1" else {}
    return {
        "run": str(plan.run),
        **processes,
        "data": plan.data,
        "model": f"{count(plan.parameters)} parameters",
        "steps": f"{first}, of {count(plan.tokens_per_step)} tokens ({passes})",
        "device": ", ".join(
            [plan.device, plan.dtype, *["compiled"] * plan.compiled, *["CUDA graphs"] * plan.cuda_graphs]
        ),
        "operator": plan.backend,
    }


def utilisation_rows(record: TrainRecord) -> dict[str, str]:
    """Empty where the device's peak is not known."""
    if record.mfu_computed is None or record.mfu_dense is None:
        return {}
    computed, dense = share(record.mfu_computed), share(record.mfu_dense)
    return {"FLOPs utilisation": f"{computed} of what is computed, {dense} of a dense model's (6N + 12LdT)"}


def train_words(record: TrainRecord) -> str:
    """A record as one plain line; it gives each sparsity measure for the layers from first to last."""
    utilisation = ""
    if record.mfu_computed is not None and record.mfu_dense is not None:
        utilisation = f"MFU {share(record.mfu_computed)} computed, {share(record.mfu_dense)} dense  "
    support = "/".join(f"{layer.effective_support:.1f}" for layer in record.layers)
    capped = "/".join(f"{layer.capped_share:.0%}" for layer in record.layers)
    budget = "/".join(f"{layer.sparsity_k:.2f}" for layer in record.layers)
    return (
        f"loss {record.loss:.4f}  {record.bits_per_byte:.3f} bits/byte  lr {record.lr:.2e}  "
        f"{count(record.tokens_per_second)} tokens/s  {duration(record.seconds_left)} left  "
        f"{utilisation}data wait {share(record.data_wait)}  "
        f"{memory(record.memory_bytes)}  support {support}  capped {capped}  k {budget}"
    )


def refused_words(record: RefusedRecord) -> str:
    return (
        f"refused: {record.saw}; the weights stay as they were, and the step is tried with the next batch "
        f"({record.in_a_row} in a row)"
    )


def validation_words(record: ValidationRecord) -> str:
    averaged = "" if record.ema_loss is None else f"; of the averaged weights {record.ema_loss:.4f}"
    return f"loss {plus_minus(record.loss, record.standard_error)}, {record.bits_per_byte:.4f} bits per byte{averaged}"


def layer_table(layers: Sequence[LayerRecord]) -> Table:
    made = table("layer", "mean k", "effective support", "capped / k", "distance back", "active units")
    for layer in layers:
        made.add_row(
            str(layer.layer),
            f"{layer.sparsity_k:.3f}",
            f"{layer.effective_support:.2f}",
            share(layer.capped_share),
            f"{layer.distance_back:.1f}",
            share(layer.active_units),
        )
    return made
