"""A sweep: its jobs as they run, and its tables, for a terminal and as Markdown."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cda_cli.console.base import (
    Trimmed,
    count,
    duration,
    is_live,
    memory,
    out,
    print_pairs,
    print_trimmed,
    share,
    table,
)
from cda_cli.console.text import heading, print_sentence, printable
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.sweep.attempts import Attempt
    from cda_cli.sweep.jobs import Running
    from cda_cli.sweep.result import ArmResult, Curve, Result
    from cda_cli.sweep.student_t import Mean
    from cda_cli.sweep.work import Job

DASH = "–"


class SweepDisplay:
    """Shows the jobs on stderr: those that run, drawn anew, and a line for each that ended; off a terminal lines alone.

    Stdout stays free for the result.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, transient=True, auto_refresh=False, redirect_stdout=False)
        self._drawn = is_live(self._console)
        self._held: set[str] = set()  # names of jobs that were said to be still running

    def __enter__(self) -> SweepDisplay:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def started(self, running: Running) -> None:
        if not self._drawn:
            where = f" on {running.device}" if running.device else ""
            self._say(f"{running.job.name}: started{where}")

    def ended(self, attempt: Attempt, running: Running) -> None:
        record = running.record
        if attempt.exit_code:
            words = attempt.error or "stopped"
        else:
            words = attempt.error or (f"finished, training loss {record.loss:.4f}" if record else "finished")
        self._say(f"{attempt.job}: {words} ({duration(attempt.seconds)})", "red" if attempt.error else "")

    def refresh(self, running: Sequence[Running], waiting: int, held: Sequence[Job], *, stopping: bool) -> None:
        for job in held:
            if job.name not in self._held:
                self._held.add(job.name)
                self._say(f"{job.name}: still running since an earlier sweep")
        if not self._drawn:
            return
        words = f"{waiting:,} waiting"
        if stopping:
            words = "stopping: each finishes its step and saves"
        elif held:
            words = f"{len(held):,} since an earlier sweep, {words}"
        title = f"{counted(len(running), 'job')} running, {words}"
        parts: list[RenderableType] = [Text(title, style="bold yellow" if stopping else "bold")]
        if running:
            rows = table("run", "step", "loss", "tokens/s", "left")
            for each in running:
                rows.add_row(printable(each.job.name), *_progress(each))
            parts.append(Trimmed(rows))
        self._live.update(Group(*parts), refresh=True)

    def _say(self, words: str, style: str = "") -> None:
        print_sentence(self._console, printable(words), style)


def _progress(running: Running) -> list[str]:
    record, steps = running.record, running.job.steps
    if record is None:
        return [f"0/{steps}" if steps else DASH, DASH, DASH, DASH]
    speed = count(record.tokens_per_second) if record.tokens_per_second > 0 else DASH
    return [f"{record.step}/{steps}", f"{record.loss:.4f}", speed, duration(record.seconds_left)]


class Section(NamedTuple):
    """A part of the result: sentences and a table, of which each may be missing."""

    title: str
    sentences: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def show_sweep(result: Result) -> None:
    """Prints where the metrics come from, and each section."""
    console = out()
    print_pairs(console, provenance(result))
    for section in sections(result):
        heading(console, section.title)
        if section.rows:
            made = table(*section.columns)
            for row in section.rows:
                made.add_row(*map(printable, row))
            print_trimmed(console, made)
        for sentence in section.sentences:
            print_sentence(console, printable(sentence))


def sweep_markdown(result: Result, picture: str | None = None) -> str:
    """The same as a page of Markdown, with the picture of that name, from where the page lies."""
    lines = [f"# {result.sweep.file.stem}", ""]
    provided = provenance(result)
    provided["command"] = f"`{provided['command']}`"
    lines += [f"- {name}: {value}" for name, value in provided.items()]
    if picture:
        shown = "!" * (not picture.lower().endswith(".pdf"))  # which no reader of Markdown shows in a page
        lines += ["", f"{shown}[The losses of all arms and seeds]({quote(picture)})"]
    for section in sections(result):
        lines += ["", f"## {section.title}", ""]
        if section.rows:
            lines += [_row(section.columns), _row(["---", *["---:"] * (len(section.columns) - 1)])]
            lines += [_row(row) for row in section.rows]
        lines += [""] * bool(section.sentences and section.rows)
        lines += [f"- {sentence}" for sentence in section.sentences]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def provenance(result: Result) -> dict[str, str]:
    """Where the metrics come from, in words."""
    found = result.provenance
    spec = result.sweep.spec
    held = {"tokens": "tokens", "parameters": "tokens and parameters", "time": f"time, {spec.minutes or 0:g} minutes"}
    return {
        **({"form": "reduced, by --reduced"} if found["reduced"] else {}),
        "date": " to ".join(dict.fromkeys([*found["dates"][:1], *found["dates"][-1:]])) or DASH,
        "machine": "; ".join([*found["machines"], *(name for name in found["devices"] if name != "auto")]) or DASH,
        "versions": "; ".join(found["versions"]) or DASH,
        "commit": ", ".join(found["commits"]) or DASH,
        "command": found["command"],
        "data": _of_arms(found["data"]),
        "steps": _of_arms({arm: f"{steps:,}" if steps else DASH for arm, steps in found["steps"].items()}),
        "seeds": ", ".join(map(str, found["seeds"])),
        "hours": f"{found['hours']:.2f}",
        "held equal": held[spec.equal],
    }


def _of_arms(values: Mapping[str, str]) -> str:
    """What all arms have, or what each of them has."""
    of_all = set(values.values())
    return of_all.pop() if len(of_all) == 1 else "; ".join(f"{arm} {value}" for arm, value in values.items())


def sections(result: Result) -> Iterator[Section]:
    """The tables, and what could not go into them."""
    if result.decisions:
        words = [sentence for decision in result.decisions for sentence in decision.words()]
        if (claims := len(result.decisions)) > 1 and any(math.isfinite(each.worse[0]) for each in result.decisions):
            words.append(f"The level of 95 % is that of each of the {claims} claims by itself.")
        yield Section("Pre-registered comparison", [*words, *result.registration])
    if result.sweep.spec.tune:
        yield _tuning(result)
    yield _losses(result)
    if result.sweep.spec.eval and not result.sweep.spec.eval.tasks:
        yield _evaluated(result)
    for curve in result.curves:
        yield _curve(result, curve)
    yield _costs(result)
    if problems := list(_problems(result)):
        yield Section("Not in the tables", problems)


def _tuning(result: Result) -> Section:
    rows, sentences = [], []
    for arm in result.arms:
        for each in arm.tuned:
            loss = _number(each.loss, ".4f") if not each.error else "failed"
            rows.append([f"{arm.name}, {each.point.name}", loss, "chosen" if each.is_chosen else ""])
            if each.error:
                sentences.append(f"{arm.name}, {each.point.name}, failed: {each.error}")
        for key, end in arm.at_ends():
            sentences.append(f"{arm.name} came out with the {end} {key} of its grid; one beyond it may be better.")
        if better := arm.missed():
            sentences.append(
                f"{arm.name} had gone on before {better.name} finished, which came out lower; remove its seed-* to "
                "train it with that."
            )
    sweep, tune = result.sweep, result.sweep.spec.tune
    steps = [sweep.steps(name) or 0 for name, arm in sweep.spec.arms.items() if not arm.begins]
    if tune and tune.steps and max(steps, default=0) > tune.steps:
        sentences.append(
            f"These runs had {tune.steps:,} of {max(steps):,} steps, but for forks: what is best then need not be so "
            "at the end."
        )
    return Section("Tuning, validation loss", sentences, ["arm", "loss", ""], rows)


def _losses(result: Result) -> Section:
    columns = [*_columns(result), "support"]
    rows = [[*_loss(result, arm, ""), _number(arm.mean("effective_support").value, ".1f")] for arm in result.arms]
    return Section("Validation loss, means over seeds", _explanations(result), columns, rows)


def _evaluated(result: Result) -> Section:
    rows = [_loss(result, arm, "eval.") for arm in result.arms]
    return Section("Loss of the evaluation, means over seeds", (), _columns(result), rows)


def _columns(result: Result) -> list[str]:
    return ["arm", "seeds", result.measure.column, "deviation", "− control", "95 % interval"]


def _loss(result: Result, arm: ArmResult, prefix: str) -> list[str]:
    metric = f"{prefix}{result.measure.metric}"
    mean, difference = arm.mean(metric), arm.difference(metric)
    is_control = arm.name == result.sweep.spec.control
    return [
        arm.name,
        f"{mean.seeds}/{len(arm.runs)}",
        _number(mean.value, ".4f"),
        _number(mean.deviation, ".4f"),
        *([DASH, DASH] if is_control else _difference(difference)),
    ]


def _curve(result: Result, curve: Curve) -> Section:
    """A metric of the evaluations by a number, and below each arm how far that is above the control."""
    form, factor, signed = (".4f", 1, "+.4f") if curve.whole else (".1f", 100, "+.1f")
    names, rows = [*([curve.whole] if curve.whole else []), *curve.metrics.values()], []
    for arm in result.arms:
        rows.append([arm.name, *(_number(factor * arm.mean(name).value, form) for name in names)])
        if curve.whole or arm.name != result.sweep.spec.control:
            rows.append(["", *(_number(factor * arm.difference(name, curve.whole).value, signed) for name in names)])
    control = f"{result.sweep.spec.control} with all keys" if curve.whole else result.sweep.spec.control
    notes = [f"Below each arm: how far it is above {control}, paired by seed; --json has the intervals."]
    if curve.scored:
        trained = _of_arms(result.provenance["data"])
        notes.append(f"Scored: {counted(curve.scored, 'sequence')} of each length. Trained on: {trained}.")
    columns = ["arm", *(["all"] if curve.whole else []), *map(str, curve.metrics)]
    return Section(curve.title, notes, columns, rows)


def _explanations(result: Result) -> list[str]:
    if len(result.arms) == 1:
        return []
    found = [f"Differences from {result.sweep.spec.control}, the control, are paired by seed."]
    others = [arm for arm in result.arms if arm.name != result.sweep.spec.control]
    if any(math.isfinite(arm.difference(result.measure.metric).low) for arm in others):
        found = [f"{found[0]} Their interval is Student's, over seeds; it leaves out the choice of the text."]
        if len(others) > 1:
            found.append("The level is that of each difference by itself.")
    elif len(result.sweep.spec.seeds) == 1:
        found.append("One seed gives no interval; give two or more.")
    if not result.sweep.is_validated_alike():
        found.append(
            "By their settings the arms are validated on unequal parts of a text, or on other text, so a difference is "
            "also that of the text; `eval` without max_batches takes all of it."
        )
    return found


def _costs(result: Result) -> Section:
    columns = ["arm", "tokens", "time", "tokens/s", "memory", "active units", "blocks"]
    rows = [_cost(arm) for arm in (*result.trunks, *result.arms)]
    if all(blocks == DASH for *_, blocks in rows):  # There is no router.
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    notes = ["The time of a fork is that after its trunk."] if result.trunks else []
    if result.unrecorded:
        runs = counted(result.unrecorded, "run has", "runs have")
        notes.append(f"{runs} no recorded attempt: commit, machine and hours are without them.")
    return Section("Cost of a run, means over seeds", notes, columns, rows)


def _cost(arm: ArmResult) -> list[str]:
    means = {name: arm.mean(name).value for name in ("tokens", "seconds", "tokens_per_second", "memory_bytes")}
    tokens, seconds, speed, size = (means[name] for name in means)
    units, blocks = (arm.mean(name).value for name in ("active_units", "active_blocks"))
    return [
        arm.name,
        count(tokens) if math.isfinite(tokens) else DASH,
        duration(seconds) if math.isfinite(seconds) else DASH,
        count(speed) if math.isfinite(speed) else DASH,
        memory(size) if math.isfinite(size) else DASH,
        share(units) if math.isfinite(units) else DASH,
        _number(blocks, ".2f"),
    ]


def _problems(result: Result) -> Iterator[str]:
    drop, control = result.sweep.spec.drop, result.sweep.spec.control
    for arm in result.arms:
        if drop and arm.is_dropped:
            yield (
                f"{arm.name} was dropped: after {counted(drop.seeds, 'seed')} it was worse than {control} by "
                f"{arm.worse:.4f} ({drop.metric}), which is more than {drop.margin:g}"
            )
    for run in result.runs:
        if run.state == "failed":
            yield f"{run.arm}, seed {run.seed}, failed: {run.error}"
    unfinished = [run for run in result.runs if run.state in ("running", "unfinished")]
    if unfinished:
        names = ", ".join(f"{run.arm} seed {run.seed}" for run in unfinished)
        yield f"{counted(len(unfinished), 'run has', 'runs have')} not finished: {names}"


def _difference(difference: Mean) -> list[str]:
    interval = DASH
    if math.isfinite(difference.low):
        interval = f"{difference.low:+.4f} … {difference.high:+.4f}"
    return [_number(difference.value, "+.4f"), interval]


def _number(value: float, form: str) -> str:
    digits = int(form[-2])
    return format(round(value, digits) + 0.0, form) if math.isfinite(value) else DASH
