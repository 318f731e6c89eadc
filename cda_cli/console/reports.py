"""Results: an export, an import, a diagnosis, a dry run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.text import Text

from cda_cli.console.base import count, memory, out, print_pairs, print_trimmed, share, table
from cda_cli.console.run_status import plan_rows
from cda_cli.console.text import heading, print_next, section
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.diagnosis import Cache, Diagnosis
    from cda_cli.interchange.export import Exported
    from cda_cli.interchange.import_model import Imported
    from cda_cli.training.run import DryRun


def show_export(exported: Exported, address: str | None, planned: str | None) -> None:
    """Shows the files of an export: where they are, or which of them would be sent to the repository `planned`."""
    console = out()
    files = table("file", "size")
    for name, size in exported.files.items():
        files.add_row(name, memory(size))
    files.add_row("together", memory(sum(exported.files.values())))
    rows = {"checkpoint": str(exported.checkpoint)}
    rows |= {"folder": str(exported.folder)} if planned is None else {"for": planned}
    print_pairs(console, rows | ({"sent to": address} if address else {}))
    print_trimmed(console, files)
    if planned is not None:
        console.print("dry run: nothing was sent, and no folder was written")


COMMON_CONTEXT = 1024  # of training, where memory is that of one GPU, or less


def show_import(imported: Imported) -> None:
    data = imported.config.data
    marks = {"begins with": data.bos, "ends with": data.eos}
    ends = ", ".join(f"a document {verb} {token}" for verb, token in marks.items() if token)
    rows = {
        "run": str(imported.run),
        "from": f"{imported.origin['source']} ({imported.origin['architecture']})",
        "licence": imported.origin["license"] or "not stated",
        "parameters": f"{count(imported.parameters)} ({imported.parameters:,})",
        "attention": imported.attention,
        "context": counted(imported.config.model.seq_len, "token"),
        "tokenizer": ", ".join(filter(None, [f"{imported.config.model.vocab_size:,} tokens", ends])),
    }
    console, run = out(), shlex.quote(str(imported.run))
    print_pairs(console, rows)
    # A new run has the learning rate of its preset, which is for random weights.
    shorter = f" --seq-len {COMMON_CONTEXT}" if imported.config.model.seq_len > COMMON_CONTEXT else ""
    train = f"cda train --init-from {run} --data TEXT --lr {imported.config.optim.lr:g}{shorter} --out RUN"
    print_next(console, [f'cda sample {run} --prompt "The "', f"cda eval {run} --data TEXT", train])


def show_doctor(diagnosis: Diagnosis) -> None:
    console = out()
    console.print(Text("Versions", style="bold"))
    print_pairs(console, diagnosis.versions)
    devices = {str(number): device for number, device in enumerate(diagnosis.devices)}
    backends, cache = diagnosis.backends, cache_rows(diagnosis.cache)
    for title, rows in (("Devices", devices), ("Backend of each solver", backends), ("Cache of prepared text", cache)):
        heading(console, title)
        print_pairs(console, rows)
    checks = table("case", "error", "at most", "")
    for check in diagnosis.checks:
        verdict = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        checks.add_row(check.name, f"{check.error:.1e}", f"{check.tolerance:.1e}", verdict)
    section("The operator against its float64 optimum", checks)


def cache_rows(cache: Cache) -> dict[str, str]:
    return {
        "folder": f"{cache.folder} (the environment variable CDA_CACHE names another)",
        "size": f"{memory(cache.size)} (remove the folder to empty the cache)",
    }


def show_forecast(result: DryRun) -> None:
    """Shows what is known before anything is tried, so that it is out before a batch uses up the memory."""
    console = out()
    print_pairs(console, {**plan_rows(result.plan), "memory, forecast": forecast_words(result)})
    console.file.flush()


def show_dry_run(result: DryRun) -> None:
    """Shows what a dry run found. Call `show_forecast` before it."""
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
    print_pairs(console, rows)
    console.print("dry run: nothing was written")


def forecast_words(result: DryRun) -> str:
    """Says what the memory goes into. Each part is given at its largest, and not all are there at one time."""
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
