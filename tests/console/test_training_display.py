"""The view of a run: plain lines off a terminal, and live on one, with the same figures at the end."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest

from cda_cli.console import TrainingDisplay
from cda_cli.console.live_view import NOTICE
from cda_cli.console.reports import show_doctor, show_dry_run, show_forecast
from cda_cli.diagnosis import Cache, Check, Diagnosis
from cda_cli.runs.records import CheckpointRecord, HeadAlarm, Record, RefusedRecord, SampleRecord
from cda_cli.training.accounting.memory_forecast import Forecast
from cda_cli.training.display import Plan
from cda_cli.training.run import DryRun
from tests.console.conftest import MakeScreen, Screen
from tests.console.plans import PLAN, records
from tests.runs.records import TRAIN, VALIDATION

SAMPLE = "a\tb \N{ESCAPE}[2J[bold]\xa0\u3000\r\n" + "long " * 50 + "end"
RECORDS: list[Record] = [
    TRAIN,
    VALIDATION,
    SampleRecord(step=10, text=SAMPLE),
    RefusedRecord(step=11, saw="loss nan, gradient norm inf", in_a_row=2),
    CheckpointRecord(step=10, path="runs/[x]/checkpoints/step-00000010"),
]


def shown(screen: Screen, plan: Plan = PLAN) -> str:
    display = TrainingDisplay()
    display.note("a [note]")
    display.start(plan, [])
    for record in RECORDS:
        display.show(record)
        display.advance(record.step, 61.0)
    display.finish()
    return screen.getvalue()


def test_plain_lines(screen: MakeScreen) -> None:
    """Each figure is in its line; nothing steers a terminal, is wrapped, or is taken for markup."""
    text = shown(screen())
    lines = text.split("\n")
    assert "a [note]" in lines
    assert "run        runs/[x]" in lines
    assert "model      4 layers × 128, 4 heads, context 256, 1.23 M parameters" in lines
    assert "attention  coordinate-descent, k = 2, exact solver, ε = 0.1" in lines
    assert "training   batch 16, adamw, learning rate 0.001" in lines
    assert "steps      20, of 512 tokens (1.25 passes over the text)" in lines
    assert (
        "10/20  loss 2.5000  3.607 bits/byte  lr 1.00e-03  gradient 0.75  1 k tokens/s  1:01 left\n"
        "       data wait 1.2%  512 MiB  k 1.50  support 4.2–9.0  capped 12%\n"
    ) in text
    assert "10/20  validation loss 2.6250 ± 0.5000, 3.7500 bits per byte" in lines
    assert (
        "11/20  refused: loss nan, gradient norm inf; the weights stay as they were, and the step is tried with the "
        "next batch (2 in a row)"
    ) in lines
    assert "10/20  saved runs/[x]/checkpoints/step-00000010" in lines
    masked = SAMPLE.replace("\N{ESCAPE}", "\N{REPLACEMENT CHARACTER}").replace("\r", "\N{REPLACEMENT CHARACTER}")
    assert f"\n{masked}\n" in text
    assert "\N{ESCAPE}" not in text


def test_a_terminal_keeps_the_figures_at_the_end(screen: MakeScreen) -> None:
    """The live view is taken away; the last figures stay as a table, the cursor is given back."""
    text = shown(screen(terminal=True))
    assert text.count("\N{ESCAPE}[?25l") == text.count("\N{ESCAPE}[?25h") == 1, "the cursor is hidden, or not shown"
    end = text[text.rindex("\N{ESCAPE}[?25h") :]
    for words in ("10 of 20", "2.5000", "at step 10", "effective support", "12.5%", "75.0%"):
        assert words in end
    assert "\N{ESCAPE}[2J" not in text, "the text of a sample cleared the screen"
    assert "\N{REPLACEMENT CHARACTER}[2J[bold]\xa0\u3000" in text


@pytest.mark.parametrize(
    ("name", "value"), [("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("TTY_INTERACTIVE", "1"), ("FORCE_COLOR", "3")]
)
def test_the_environment_decides_colour_alone(
    screen: MakeScreen, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A file is no terminal: it gets each log line, and nothing that moves a cursor."""
    made = screen()
    monkeypatch.setenv(name, value)
    text = shown(made)
    assert "tokens/s  1:01 left" in text
    assert set(re.findall(r"\x1b[^m]*?[A-Za-z]", text)) <= set(re.findall(r"\x1b\[[0-9;]*m", text))


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TTY_COMPATIBLE", "0"), ("TTY_INTERACTIVE", "0")])
def test_a_terminal_that_cannot_be_drawn_on_gets_lines(
    screen: MakeScreen, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    made = screen(terminal=True)
    monkeypatch.setenv(name, value)
    text = shown(made)
    assert "tokens/s\n       1:01 left\n" in text
    assert not re.findall(r"\x1b[^m]*?[A-LN-Za-ln-z]", text)


def test_utilisation_names_both_figures(screen: MakeScreen) -> None:
    """One number without its rule could be either; on a CPU there is none."""
    made = screen()
    known = replace(TRAIN, mfu_computed=0.4567, mfu_dense=0.5)
    display = TrainingDisplay()
    display.start(PLAN, [])
    display.show(known)
    display.finish()
    assert "MFU 45.7% computed, 50.0% dense" in made.getvalue()
    assert "45.7% of the FLOPs computed, 50.0% of a dense model's (6N + 12LdT)" in made.getvalue()
    assert "utilisation" not in shown(screen())


def test_auxiliary_losses_are_told_where_there_are_any(screen: MakeScreen) -> None:
    made = screen()
    measured = replace(TRAIN, ff_l1=12.34567, support=23.456, support_multiplier=0.125)
    display = TrainingDisplay()
    display.start(PLAN, [])
    display.show(measured)
    display.finish()
    words = " ".join(made.getvalue().split())
    assert "gradient 0.75 L1 norm 12.35 mean support 23.46 multiplier 0.125 1 k tokens/s" in words
    assert "auxiliary L1 norm 12.35, mean support 23.46, multiplier 0.125" in words
    assert "auxiliary" not in shown(screen())


def test_heads_that_stop_to_select_are_named(screen: MakeScreen) -> None:
    """In the live view and at the end, as long as they do; off a terminal in a line, once."""
    states = [(layer, head, "spread") for layer in (0, 1) for head in range(4)] + [(2, 3, "sink")]
    alarms = tuple(HeadAlarm(layer=layer, head=head, state=state) for layer, head, state in states)
    words = "on the first key 2.3; spread over all keys 0.0, 0.1, 0.2, 0.3, 1.0, 1.1 and 2 more"
    for terminal in (False, True):
        made = screen(terminal=terminal, width=120)
        display = TrainingDisplay()
        display.start(PLAN, [])
        for step, found in enumerate(((), alarms[:1], alarms[:1], (), alarms), start=10):
            display.show(replace(TRAIN, step=step, alarms=found))
        display.finish()
        assert f"heads          {words}" in re.sub(r"\x1b\[[0-9;]*m", "", made.getvalue())
        lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", made.getvalue()).splitlines() if "/20  heads" in line]
        later = words.replace("0.0, ", "").replace("1.1 and 2 more", "1.1, 1.2 and 1 more")
        assert lines == ([] if terminal else ["11/20  heads spread over all keys 0.0", f"14/20  heads {later}"])


def test_a_run_without_figures_ends_quietly(screen: MakeScreen) -> None:
    """An error before the first log line: no empty table, no hidden cursor."""
    made = screen(terminal=True)
    display = TrainingDisplay()
    display.start(PLAN, [])
    display.finish()
    assert made.getvalue().count("\N{ESCAPE}[?25l") == made.getvalue().count("\N{ESCAPE}[?25h")
    assert "loss" not in made.getvalue()


def test_the_plan_says_where_it_goes_on(screen: MakeScreen) -> None:
    resumed = shown(screen(), PLAN._replace(first_step=5, epochs=None, compiled=True))
    assert "from step 5 to 20, of 512 tokens (streamed)" in resumed
    assert "cpu, float32, compiled" in resumed


def test_a_dry_run_tells_the_memory(screen: MakeScreen) -> None:
    made = screen()
    parts = Forecast(2**20, 2**20, 2**21, 2**20, 2**24, 2**23, 2**26, 2**29)
    result = DryRun(PLAN, 5.5, "AdamW", parts, 2**30, on_gpu=True)
    show_forecast(result)
    show_dry_run(result)
    for words in (
        "1.23 M parameters", "5.5000", "peak 512 MiB: weights 1 MiB, gradients 1 MiB, AdamW 2 MiB, averaged weights 1",
        "activations 16 MiB", "logits and loss 8 MiB", "workspaces 64 MiB", "peak 1 GiB in two steps",
        "the forecast is 50.0% of it", "nothing",
    ):  # fmt: skip
        assert words in " ".join(made.getvalue().split())
    unknown = screen()
    result = DryRun(PLAN, 5.5, "AdamW", None, 2**30, on_gpu=False)
    show_forecast(result)
    show_dry_run(result)
    assert "none for backend colt5" in unknown.getvalue()
    assert "peak 1 GiB of this process with one batch" in unknown.getvalue()


def test_a_check_that_failed_is_seen(screen: MakeScreen) -> None:
    made = screen()
    checks = [Check("good", 1e-7, 1e-5), Check("bad", 1e-3, 1e-5)]
    show_doctor(Diagnosis({"torch": "2"}, ["cpu"], {"exact": "torch"}, Cache("cache", 0), checks))
    rows = [line.split() for line in made.getvalue().splitlines()]
    assert ["good", "1.0e-07", "1.0e-05", "ok"] in rows
    assert ["bad", "1.0e-03", "1.0e-05", "FAILED"] in rows


def test_off_a_terminal_lines_are_narrow_and_end_in_no_space(screen: MakeScreen) -> None:
    """A log is read in any window, and compared by tools that take a space at the end for a change."""
    made = screen()
    display = TrainingDisplay()
    display.start(PLAN._replace(steps=1_000_000), [])
    for record in records(100, averaged=True, known_peak=True):
        display.show(record)
        display.advance(record.step, 3600.0 * 200)
    display.finish()
    lines = made.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line.endswith(" ")]
    assert len([line for line in lines if re.match(r"\d+ +1.500", line)]) == 100, "a layer is missing at the end"


def test_a_rule_without_a_budget_has_no_k(screen: MakeScreen) -> None:
    text = shown(screen(), PLAN._replace(has_budget=False, attention="softmax"))
    assert "support 4.2–9.0\n" in text
    assert "effective support  distance back  active units\n" in text
    assert "capped" not in text


def test_the_blocks_that_a_router_chose_have_a_column_within_a_terminal(screen: MakeScreen) -> None:
    made = screen()
    display = TrainingDisplay()
    display.start(PLAN, [])
    display.show(replace(TRAIN, layers=tuple(replace(layer, active_blocks=4.5) for layer in TRAIN.layers)))
    display.advance(TRAIN.step, 61.0)
    display.finish()
    [header] = [line for line in made.getvalue().splitlines() if line.startswith("layer")]
    assert header.endswith("active units  blocks")
    assert len(header) <= 80
    assert re.search(r"^0 .* 75.0% +4.50$", made.getvalue(), re.MULTILINE)


def test_a_run_that_goes_on_knows_what_came_before(screen: MakeScreen) -> None:
    """The best validation may be one of an earlier process."""
    made = screen()
    display = TrainingDisplay()
    display.start(PLAN._replace(first_step=10), records(2))
    display.show(replace(TRAIN, step=12))
    display.advance(12, None)
    display.finish()
    assert "best           3.0000 at step 8; the last validation was at step 10\n" in made.getvalue()


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (436, "the first 20 of 436 windows; cda eval takes them all, so its loss differs"),
        (20, "all 20 windows, as in cda eval"),
        (None, "the first 20 windows of the stream; cda eval takes another number of them"),
    ],
)
def test_the_end_says_why_an_evaluation_may_differ(screen: MakeScreen, windows: int | None, words: str) -> None:
    assert f"validated on   {words}\n" in shown(screen(), PLAN._replace(validation_windows=windows))


def test_the_end_names_the_next_commands(screen: MakeScreen) -> None:
    """With the path of the run, quoted for a shell, also where a stop came during the last step.

    Of a run that was stopped before, the error says how it goes on: a second command would be one too many.
    """
    made = screen()
    display = TrainingDisplay()
    display.start(PLAN._replace(steps=10), [])
    for record in (TRAIN, CheckpointRecord(step=10, path="x")):
        display.show(record)
        display.advance(record.step, None)
    display.stopping()
    display.finish()
    commands = made.getvalue().partition("Next:\n")[2].splitlines()
    assert commands == [
        "  cda eval 'runs/[x]'",
        "  cda sample 'runs/[x]' --prompt \"The \"",
        "  cda inspect-sparsity 'runs/[x]'",
    ]
    stopped = screen()
    display = TrainingDisplay()
    display.start(PLAN, [])
    for record in (TRAIN, CheckpointRecord(step=10, path="x")):
        display.show(record)
        display.advance(record.step, None)
    display.stopping()
    display.finish()
    assert "cda" not in stopped.getvalue().partition("\nstep ")[2]


def test_a_step_that_was_not_saved_has_no_next_commands(screen: MakeScreen) -> None:
    """They would read an earlier checkpoint."""
    made = screen()
    display = TrainingDisplay()
    display.start(PLAN, [])
    display.show(TRAIN)
    display.show(CheckpointRecord(step=10, path="x"))
    display.advance(11, None)
    display.finish()
    assert "Next:" not in made.getvalue()


def test_a_request_to_stop_is_answered_at_once(
    screen: MakeScreen, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The view says so where there is one; else a terminal gets a line, and a file none."""
    made = screen(terminal=True)
    display = TrainingDisplay()
    display.start(PLAN, [])
    display.stopping()
    display.finish()
    assert NOTICE in made.getvalue()
    assert not capfd.readouterr().err
    display = TrainingDisplay()
    display.stopping()
    assert not capfd.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display.stopping()
    assert capfd.readouterr().err == f"{NOTICE}\n"


def test_sentences_are_wrapped_between_words(screen: MakeScreen) -> None:
    """On a terminal, that is: off one a sentence stays a line. A path stays whole, so that it can be copied."""
    path = "/a" * 30
    sentence = f"resuming from {path}, step 250, with a schedule of another length"
    made = screen(terminal=True, width=40)
    TrainingDisplay().note(sentence)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", made.getvalue()).splitlines()
    assert lines == [
        "resuming from",
        f"{path},",
        "step 250, with a schedule of another",
        "length",
    ]
    plain = screen()
    TrainingDisplay().note(sentence)
    assert plain.getvalue() == f"{sentence}\n"


def test_a_terminal_sees_at_once_that_something_begins(screen: MakeScreen) -> None:
    """Off one nothing is printed before the run has started, as an error may end it yet."""
    made = screen(terminal=True)
    display = TrainingDisplay()
    with display.busy("starting [x]"):
        pass
    assert "starting [x] …" in made.getvalue()
    assert made.getvalue().count("\N{ESCAPE}[?25l") == made.getvalue().count("\N{ESCAPE}[?25h") == 1
    plain = screen()
    display = TrainingDisplay()
    with display.busy("starting [x]"):
        pass
    assert plain.getvalue() == ""


def test_few_passes_over_the_text_are_no_zero(screen: MakeScreen) -> None:
    assert "(under 0.01 passes over the text)" in shown(screen(), PLAN._replace(epochs=0.003))
    assert "(2.04 passes over the text)" in shown(screen(), PLAN._replace(epochs=2.04))


def test_what_the_header_says_is_said_once(screen: MakeScreen) -> None:
    """Below the plan the view would repeat it; it is printed at the end, when the view has gone."""
    made = screen(terminal=True)
    display = TrainingDisplay()
    display.start(PLAN, [])
    before = made.getvalue()
    assert before.count(PLAN.attention) == 1, "not once in the view"
    display.show(TRAIN)
    display.finish()
    end = made.getvalue().rpartition("\x1b[?25h")[2]
    for words in (PLAN.attention, "1.23 M parameters", "learning rate 0.001"):
        assert words in end


def test_the_view_is_not_drawn_while_a_record_is_printed(screen: MakeScreen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two would go back by the rows that the other has not drawn yet, and lines would be lost."""
    made = screen(terminal=True)
    display = TrainingDisplay()
    display.start(PLAN, [])
    free: list[bool] = []

    def try_to_draw() -> None:
        free.append(view.acquire(blocking=False))
        if free[-1]:
            view.release()

    def write(text: str) -> int:
        other = Thread(target=try_to_draw)
        other.start()
        other.join()
        return len(text)

    assert display._live
    view: Any = display._live.held()
    monkeypatch.setattr(made, "write", write)
    display.show(CheckpointRecord(step=10, path="x"))
    display.note("a sentence")
    monkeypatch.undo()
    display.finish()
    assert free
    assert not any(free)
