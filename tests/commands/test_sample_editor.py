"""The line editor of `cda sample RUN` on a terminal: what each line does, and that no line ends it."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cda_cli
from cda_cli import main
from cda_cli.console.text import printable
from cda_cli.inspection.read_keys import keys_read
from tests.commands.helpers import Cda

GREEDY = ("--temperature", "0")
Session = Callable[..., tuple[list[str], str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def session(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Types lines into `cda sample RUN`. Returns what each was answered, and stderr."""

    def typed(*lines: str, options: tuple[str, ...] = (), code: int = 0) -> tuple[list[str], str]:
        out, err = Terminal(), io.StringIO()
        command = ["cda", "sample", "--device", "cpu", str(finished), "--max-new-tokens", "12", *options]
        monkeypatch.setenv("TERM", "dumb")  # no codes for colours
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as left:
            main.run()
        assert (left.value.code or 0) == code
        *answers, _ = re.split(r"(?m)(?:^|(?<=[>…] ))> |(?<=> )… ", out.getvalue())[1:] or [""]
        return answers, err.getvalue()

    return typed


def test_the_model_goes_on_from_what_is_written(cda: Cda, finished: Path, session: Session) -> None:
    """Each draw has the next seed, with which the command gives the same text."""

    def sampled(prompt: str, seed: int) -> str:
        out = cda("sample", finished, prompt, "--seed", seed, "--max-new-tokens", 12).out
        return printable(out)

    drawn, again, undone, empty, other = session("def ", "/retry", "/undo", "/undo", "x", options=("--seed", "3"))[0]
    assert drawn == sampled("def ", 3)
    assert again == sampled("def ", 4)
    assert (undone, empty) == ("def \n", "\n")
    assert other == sampled("x", 5)


def test_a_line_goes_on_after_a_backslash(session: Session) -> None:
    _, drawn, undone = session("one\\", "two", "/undo")[0]
    assert drawn.startswith("two")
    assert undone == "one\ntwo\n"


def test_enter_goes_on_and_a_slash_can_be_written(session: Session) -> None:
    answers, err = session("", "//a", "", "/undo", "/undo")
    assert answers[0] == ""
    assert answers[4] == "/a\n"
    assert answers[3].startswith("/a")
    assert len(answers[3]) > 3
    assert err.splitlines()[1:] == ["the text is empty; write at least one character"]


def test_alternatives_have_the_probabilities_of_the_model(finished: Path, session: Session) -> None:
    table, one = session("self.", "/undo", "/top", "/top 2", options=GREEDY)[0][2:]
    model = cda_cli.load(finished, device="cpu")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [("4", "'e'"), ("3", "'l'"), ("2", "'f'"), ("1", "'.'")]
    for end, row in enumerate(rows, 1):
        expected = math.exp(model.loglikelihood(("self."[:end], "self."[end])))
        assert float(row[2].rstrip("%")) / 100 == pytest.approx(expected, abs=6e-4)
    shares = [float(line.split()[-1].rstrip("%")) for line in one.splitlines()[1:13]]
    assert shares == sorted(shares, reverse=True)
    assert f"  {one.splitlines()[1].split()[0]}" in table.splitlines()[3]


def test_keys_that_each_head_read(finished: Path, session: Session) -> None:
    """Of all layers, or of one, for any token that follows another."""
    every, last_layer = session("self.", "/undo", "/keys", "/keys 2 1", options=GREEDY)[0][2:]
    model = cda_cli.load(finished, device="cpu")
    assert re.findall(r"(?m)^\d\.\d", every) == ["0.0", "0.1", "1.0", "1.1"]
    assert re.findall(r"(?m)^\d\.\d", last_layer) == ["1.0", "1.1"]
    heads = keys_read(model.model, list(b"sel"), model._dtype, 1)[2:]
    for head, line in zip(heads, last_layer.splitlines()[-2:], strict=True):
        [key] = head.keys
        name = "null key" if key.place is None else f"{'sel'[key.place]!r} {3 - key.place}"
        assert line.split(None, 2)[2].startswith(f"{key.weight:.2f}{'*' if key.is_capped else ' '} {name}")


def test_a_text_outgrows_the_context(session: Session) -> None:
    """32 tokens. What was written first is still there to be taken back, and any token to be asked about."""
    answers, err = session("a", "", "", "", "/keys 1 0", "/top 45", "/keys 20", *["/undo"] * 5, options=GREEDY)
    assert len(err.splitlines()) == 1
    assert "0.1" in answers[4]
    assert answers[5].startswith("in place of token 45")
    assert len(answers[7]) > 32
    assert answers[-2:] == ["a\n", "\n"]


def test_how_to_draw_can_be_changed(cda: Cda, finished: Path, session: Session) -> None:
    shown, drawn = session("/set max_new_tokens 3", "a", options=GREEDY)[0]
    assert "max_new_tokens" in shown
    assert drawn == printable(cda("sample", finished, "a", "--temperature", 0, "--max-new-tokens", 3).out)
    stopped, undone = session(f"/set stop {json.dumps(drawn[1:3])}", "a", "/undo", options=GREEDY)[0][1:]
    assert stopped == "a\nended by stop\n"
    assert undone == "a\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/tpo", "unknown command /tpo: did you mean '/top'?"),
        ("/retry", "the model did not add the last of the text; press Enter to draw"),
        ("/undo", "the text is empty; there is nothing to take back"),
        ("/top", "there is no token 1 that follows another; the text has 0"),
        ("/top 1", "there is no token 1 that follows another; the text has 0"),
        ("/keys one", "/keys takes whole numbers, 2 at most"),
        ("/top 1 2", "/top takes whole numbers, 1 at most"),
        ("/set temperature", "/set takes a name and a value, such as /set temperature 0.5"),
        ("/set temperature -1", "--temperature must be 0 or more, not -1"),
        ("/set top_k many", "top_k = 'many' is not possible: input should be a valid integer"),
        ("/set seed 1", "unknown setting seed"),
    ],
)
def test_a_wrong_line_is_one_sentence(session: Session, line: str, sentence: str) -> None:
    """After which the next line is read."""
    answers, err = session(line, "/help")
    assert answers[0] == ""
    assert "/undo" in answers[1]
    assert err.splitlines()[1].startswith(sentence)
    assert len(err.splitlines()) == 2


def test_no_editor_where_a_program_reads(session: Session) -> None:
    answers, err = session("a", options=("--json",), code=2)
    assert not answers
    assert err == "error: there is no prompt; give --prompt TEXT, --prompts FILE, or text on stdin\n"
