"""A training run, live on a terminal and as plain lines off it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cda_cli.console.base import count, duration, is_live, memory, out, pairs, plus_minus, share, shows_progress, table
from cda_cli.console.text import printable, write_text

if TYPE_CHECKING:
    from cda_cli.training.run import Plan


class TrainingDisplay:
    """The `Display` of the training loop (see `training.loop`)."""

    def __init__(self) -> None:
        self._console = out()
        self.interactive = shows_progress()
        self._is_live = is_live(self._console)
        self._steps = 0
        self._latest: dict[str, dict[str, Any]] = {}
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

    def show(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        self._latest[kind] = record
        if kind == "train":
            if not self._is_live:
                self._line(record["step"], train_words(record))
        elif kind == "refused":
            self._line(record["step"], Text(refused_words(record), style="yellow"))
        elif kind == "validation":
            self._line(record["step"], Text(f"validation {validation_words(record)}", style="bold"))
        elif kind == "sample":
            self._line(record["step"], Text("sample", style="bold"))
            # Masked off a terminal too: a log is read on one later, and metrics.jsonl has the text itself.
            write_text(self._console, printable(record["text"]) + "\n", style="cyan")
        elif kind == "checkpoint":
            self._line(record["step"], f"saved {record['path']}")

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def finish(self) -> None:
        """Leaves the latest figures as a table."""
        self._live.stop()
        if "train" in self._latest:
            self._console.print()
            self._console.print(self._figures())
            self._console.print()
            self._console.print(layer_table(self._latest["train"]["layers"]))

    def _line(self, step: int, words: str | Text) -> None:
        width = len(str(self._steps))
        self._console.print(Text.assemble((f"{step:>{width}}/{self._steps}  ", "dim"), words), soft_wrap=True)

    def _view(self) -> Group | Progress:
        if "train" not in self._latest:
            return self._bar
        return Group("", self._figures(), "", layer_table(self._latest["train"]["layers"]), "", self._bar)

    def _figures(self) -> Table:
        train, validation = self._latest["train"], self._latest.get("validation")
        rows = {
            "step": f"{train['step']} of {self._steps}",
            "loss": f"{train['loss']:.4f}  ({train['bits_per_byte']:.4f} bits per byte)",
            "validation": f"{validation_words(validation)} at step {validation['step']}" if validation else "–",
            "learning rate": f"{train['lr']:.2e}, gradient norm {train['grad_norm']:.2f}",
            "speed": f"{count(train['tokens_per_second'])} tokens/s, {duration(train['seconds_left'])} left",
            **utilisation_rows(train),
            "waiting for data": f"{share(train['data_wait'])} of a step",
            "tokens": count(train["tokens"]),
            "memory": memory(train["memory_bytes"]),
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


def utilisation_rows(record: dict[str, Any]) -> dict[str, str]:
    """Where a device's peak is known."""
    if "mfu_computed" not in record:
        return {}
    computed, dense = share(record["mfu_computed"]), share(record["mfu_dense"])
    return {"FLOPs utilisation": f"{computed} of what is computed, {dense} of a dense model's (6N + 12LdT)"}


def train_words(record: dict[str, Any]) -> str:
    """A record as one plain line; the sparsity figures are those of the layers, first to last."""
    layers = record["layers"]
    utilisation = ""
    if "mfu_computed" in record:
        utilisation = f"MFU {share(record['mfu_computed'])} computed, {share(record['mfu_dense'])} dense  "

    def each(name: str, form: str) -> str:
        return "/".join(format(layer[name], form) for layer in layers)

    return (
        f"loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte  lr {record['lr']:.2e}  "
        f"{count(record['tokens_per_second'])} tokens/s  {duration(record['seconds_left'])} left  "
        f"{utilisation}data wait {share(record['data_wait'])}  "
        f"{memory(record['memory_bytes'])}  support {each('effective_support', '.1f')}  "
        f"capped {each('capped_share', '.0%')}  k {each('sparsity_k', '.2f')}"
    )


def refused_words(record: dict[str, Any]) -> str:
    return (
        f"refused: {record['saw']}; the weights stay as they were, and the step is tried with the next batch "
        f"({record['in_a_row']} in a row)"
    )


def validation_words(record: dict[str, Any]) -> str:
    averaged = f"; of the averaged weights {record['ema_loss']:.4f}" if "ema_loss" in record else ""
    return f"loss {plus_minus(record['loss'], record['standard_error'])}, " + (
        f"{record['bits_per_byte']:.4f} bits per byte{averaged}"
    )


def layer_table(layers: list[dict[str, float]]) -> Table:
    made = table("layer", "mean k", "effective support", "capped / k", "distance back", "active units")
    for layer in layers:
        made.add_row(
            str(layer["layer"]),
            f"{layer['sparsity_k']:.3f}",
            f"{layer['effective_support']:.2f}",
            share(layer["capped_share"]),
            f"{layer['distance_back']:.1f}",
            share(layer["active_units"]),
        )
    return made
