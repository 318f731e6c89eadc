"""Results: an evaluation, a sparsity report with its heat map, a diagnosis, a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from cda_cli.console.base import memory, out, pairs, plus_minus, share, table
from cda_cli.console.heat_map import heat_map
from cda_cli.console.training import plan_rows

if TYPE_CHECKING:
    from torch import Tensor

    from cda_cli.diagnosis import Cache, Diagnosis
    from cda_cli.evaluation import Evaluation
    from cda_cli.inspection import Report
    from cda_cli.restore import Restored, TextSide
    from cda_cli.training.run import DryRun


def show_evaluation(result: Evaluation, restored: Restored, text: TextSide) -> None:
    rows = {
        "checkpoint": f"{restored.path}{', averaged weights' if restored.averaged else ''}",
        "data": f"{text.description}, {text.split}",
        "tokens": f"{result.tokens:,} in {result.windows:,} windows, for {result.text_bytes:,} bytes of text",
        "loss": f"{plus_minus(result.loss, result.standard_error)} nats per token",
        "perplexity": f"{result.perplexity:.4g}",
        "bits per byte": plus_minus(result.bits_per_byte, result.bits_per_byte_error),
    }
    out().print(pairs(rows))


def show_report(report: Report, restored: Restored, text: TextSide, drawn: tuple[int, int], weights: Tensor) -> None:
    console, model = out(), restored.config.model
    data = f"{text.description}, {text.split}"
    console.print(pairs({"checkpoint": str(restored.path), "data": data, "tokens": f"{report.tokens:,}"}))
    heads = table(
        "layer.head", "k", "row sum", "|Σλ − k|", "effective support", "λ > 1e-3", "capped / k", "distance back"
    )
    for head in report.heads:
        heads.add_row(
            f"{head.layer}.{head.head}",
            f"{head.sparsity_k:.3f}",
            f"{head.row_sum:.3f}",
            f"{head.row_sum_error:.1e}",
            f"{head.effective_support:.2f}",
            f"{head.attended_entries:.2f}",
            share(head.capped_share),
            f"{head.distance_back:.1f}",
        )
    _section(f"Attention: {restored.model.attention_description}", heads)
    units = table("layer", "units", "active (|x| > 1e-3)", "share", "dead")
    for unit in report.feed_forward:
        units.add_row(
            str(unit.layer),
            str(unit.units),
            f"{unit.active_units:.1f}",
            share(unit.active_units / unit.units),
            str(unit.dead_units),
        )
    _section(f"Feed-forward: {model.ff}", units)
    ids = [int(token) for token in text.sides[0].ids[: len(weights)]]
    labels = [restored.tokenizer.decode([token]) for token in ids]
    picture = heat_map(weights.tolist(), labels, console.width)
    _section(f"Layer {drawn[0]}, head {drawn[1]}: queries down, keys across", picture)


def _section(title: str, content: RenderableType) -> None:
    console = out()
    console.print()
    console.print(Text(title, style="bold"))
    console.print(content)


def show_doctor(diagnosis: Diagnosis) -> None:
    console = out()
    console.print(Text("Versions", style="bold"))
    console.print(pairs(diagnosis.versions))
    _section("Devices", pairs({str(number): device for number, device in enumerate(diagnosis.devices)}))
    _section("Backend of each solver", pairs(diagnosis.backends))
    _section("Cache of prepared text", pairs(cache_rows(diagnosis.cache)))
    checks = table("case", "error", "at most", "")
    for check in diagnosis.checks:
        verdict = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        checks.add_row(check.name, f"{check.error:.1e}", f"{check.tolerance:.1e}", verdict)
    _section("The operator against its float64 optimum", checks)


def cache_rows(cache: Cache) -> dict[str, str]:
    return {
        "folder": f"{cache.folder} (the environment variable CDA_CACHE names another)",
        "size": f"{memory(cache.size)} (remove the folder to empty the cache)",
    }


def show_forecast(result: DryRun) -> None:
    """What is known before anything is tried. It is out before a batch could use up the memory."""
    console = out()
    console.print(pairs({**plan_rows(result.plan), "memory, forecast": forecast_words(result)}))
    console.file.flush()


def show_dry_run(result: DryRun) -> None:
    """What came of it, after `show_forecast`."""
    rows = {} if result.loss is None else {"loss of a batch": f"{result.loss:.4f}"}
    if result.peak is None:
        rows["memory, measured"] = "not tried, as the forecast is more than the memory that is free"
    elif result.on_gpu:
        rows["memory, measured"] = f"peak {memory(result.peak)} in two steps"
        if result.forecast:
            rows["memory, measured"] += f" (the forecast is {share(result.forecast.peak / result.peak)} of it)"
    else:
        rows["memory, measured"] = f"peak {memory(result.peak)} of this process with one batch, PyTorch itself included"
    console = out()
    console.print(pairs(rows))
    console.print("dry run: nothing was written")


def forecast_words(result: DryRun) -> str:
    """The parts are each at its largest; they do not all meet."""
    parts = result.forecast
    if parts is None:
        return "none for backend colt5, whose memory cannot be followed"
    words = [
        f"weights {memory(parts.weights)}",
        f"gradients {memory(parts.gradients)}",
        f"{result.optimizer} {memory(parts.optimizer)}",
        f"averaged weights {memory(parts.average)}" if parts.average else "",
        f"activations {memory(parts.activations)}",
        f"logits and loss {memory(parts.logits)}",
        f"workspaces {memory(parts.workspaces)}" if parts.workspaces else "",
    ]
    return f"peak {memory(parts.peak)}: {', '.join(filter(None, words))}"
