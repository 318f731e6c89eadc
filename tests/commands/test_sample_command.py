"""`cda sample`: seeds, prompts, and text that cannot harm the terminal that shows it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.helpers import Cda, assert_refused, escapes, in_subprocess

SHORT = ("--max-new-tokens", 12)
# So hot that each byte is as likely as any other: half of them are no UTF-8, and many are control characters.
RANDOM = ("--max-new-tokens", 120, "--temperature", 100)


def sampled(cda: Cda, run: Path, *arguments: object, stdin: bytes | None = None) -> list[dict[str, Any]]:
    result = cda("sample", run, "--json", *arguments, stdin=stdin)
    assert result.code == 0, result.err
    assert result.err == ""
    samples = json.loads(result.out)["samples"]
    assert isinstance(samples, list)
    return samples


def test_the_same_seed_gives_the_same_text(cda: Cda, finished: Path) -> None:
    """In JSON, streamed and whole: a text that nobody can get again cannot be reported."""
    ask = ("sample", finished, "--prompt", "def ", *SHORT, "--seed", 3)
    [found] = sampled(cda, finished, "--prompt", "def ", *SHORT, "--seed", 3)
    [again] = sampled(cda, finished, "--prompt", "def ", *SHORT, "--seed", 3)
    [other] = sampled(cda, finished, "--prompt", "def ", *SHORT, "--seed", 4)
    assert found == again
    assert found["text"] != other["text"]
    streamed, whole = cda(*ask), cda(*ask, "--no-stream")
    assert streamed.out == whole.out
    assert streamed.out.startswith("def ")
    assert streamed.out.endswith("\n")
    assert (streamed.err, whole.err) == ("", "")


def test_samples_of_one_prompt_differ(cda: Cda, finished: Path) -> None:
    """The second is what --seed 1 alone would give, so each can be got again by itself."""
    both = sampled(cda, finished, "--prompt", "a", *SHORT, "--num-samples", 2)
    assert both[0]["text"] != both[1]["text"]
    assert [sample["seed"] for sample in both] == [0, 1]
    assert sampled(cda, finished, "--prompt", "a", *SHORT, "--seed", 1) == both[1:]


def test_temperature_0_takes_the_likeliest(cda: Cda, finished: Path) -> None:
    texts = [sampled(cda, finished, "--prompt", "a", *SHORT, "--temperature", 0, "--seed", s)[0] for s in (0, 1)]
    assert texts[0]["text"] == texts[1]["text"]
    one = sampled(cda, finished, "--prompt", "a", *SHORT, "--top-k", 1)
    assert one[0]["text"] == texts[0]["text"]


def test_a_prompt_a_line_of_a_file(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Empty lines are no prompts; headings of the samples stay out of a pipe."""
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\nsecond λ\n", encoding="utf-8")
    samples = sampled(cda, finished, "--prompts-file", file, *SHORT)
    assert [sample["prompt"] for sample in samples] == ["first", "second λ"]
    shown = cda("sample", finished, "--prompts-file", file, *SHORT)
    assert shown.err == "── prompt 1, sample 1\n── prompt 2, sample 1\n"
    assert shown.out.startswith("first")
    assert "\nsecond λ" in shown.out


def test_stdin_is_the_prompt_where_none_is_given(cda: Cda, finished: Path) -> None:
    """All of it, line ends included; bytes that are no UTF-8 become marks."""
    [found] = sampled(cda, finished, *SHORT, stdin="two\nlines λ".encode() + b"\xff")
    assert found["prompt"] == "two\nlines λ\N{REPLACEMENT CHARACTER}"
    assert found["text"] == sampled(cda, finished, *SHORT, "--prompt", found["prompt"])[0]["text"]


def test_a_context_that_is_full_goes_on(cda: Cda, finished: Path) -> None:
    """32 tokens of context, and 40 asked for."""
    [found] = sampled(cda, finished, "--prompt", "x" * 32, "--max-new-tokens", 8, "--temperature", 0)
    assert found["text"]


@pytest.mark.parametrize("flags", [(), ("--no-stream",), ("--json",)])
def test_bytes_that_are_no_text_never_come_out_raw(finished: Path, cda: Cda, flags: tuple[str, ...]) -> None:
    """Control characters of a model's text could move the cursor or set the title; JSON escapes them itself."""
    result = cda("sample", finished, "--prompt", "\N{ESCAPE}[31m", *RANDOM, *flags)
    assert result.code == 0
    assert "\N{REPLACEMENT CHARACTER}" in result.out, "the text was not random enough to show anything"
    assert escapes(result.out) == []
    result.out.encode()  # a lone surrogate has no UTF-8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_escape_sequences_are_shown_harmlessly_on_a_terminal(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the prompt is dim, by codes of our own; none of the text's may reach it."""
    from cda_cli.console import SampleDisplay

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    evil = "\N{ESCAPE}]0;title\a\N{ESCAPE}[2J\x9b5n\r\u202e[bold]:smile:"
    display = SampleDisplay(stream=True, quiet=False, several=False)
    display.begin(0, 0, evil)
    assert display.follow(["plain ", evil, "\n."]) == "plain " + evil + "\n."
    shown = screen.getvalue()
    safe = "".join("\N{REPLACEMENT CHARACTER}" if c in "\N{ESCAPE}\a\x9b\r\u202e" else c for c in evil)
    assert shown == f"\N{ESCAPE}[2m{safe}\N{ESCAPE}[0mplain {safe}\n.\n"


def test_tabs_stay_tabs(cda: Cda, finished: Path) -> None:
    """A Makefile, or a table of tab-separated values, is another file with spaces in their place."""
    result = cda("sample", finished, "--prompt", "all:\n\tcc x.c\ta\n", "--max-new-tokens", 1)
    assert result.out.startswith("all:\n\tcc x.c\ta\n")


def test_long_lines_stay_whole(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """Wrapped at the width of a terminal, the text that a pipe gets is not the model's."""
    cda("train", "--config", tiny, "--seq-len", 256, "--out", tmp_path / "run", "--steps", 1)
    prompt = "word " * 50
    assert cda("sample", tmp_path / "run", "--prompt", prompt, "--max-new-tokens", 1).out.startswith(prompt)


def test_a_reader_that_leaves_gets_no_traceback(finished: Path) -> None:
    """`cda sample … | head -c 1` is a common thing to do, and no error of anybody's."""
    command = in_subprocess("sample", finished, "--prompt", "abc", "--max-new-tokens", 2000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 1) == b"a"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141, "the exit code of a process whose reader has gone"


def test_an_argument_that_is_no_utf8_leaves_valid_json(finished: Path) -> None:
    """Python carries such a byte as a lone surrogate, which has no place in a JSON document."""
    arguments = [*map(os.fsencode, in_subprocess("sample", finished, "--json", *SHORT)), b"--prompt", b"a\xff"]
    found = subprocess.run(arguments, capture_output=True, check=True)
    assert json.loads(found.stdout.decode("utf-8"))["samples"][0]["prompt"] == "a?"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["the prompt is empty", "at least one character"]),
        (["--prompt", "x" * 33], ["33 tokens", "context 32", "shorten"]),
        ([], ["stdin is empty", "--prompt"]),
        (["--prompts-file", "nowhere"], ["nowhere cannot be read", "a prompt a line"]),
        (["--prompt", "a", "--prompts-file", "b"], ["exclude each other"]),
        (["--prompt", "a", "--temperature", "-1"], ["--temperature must be 0 or more"]),
        (["--prompt", "a", "--top-k", "0"], ["--top-k", "1 or more"]),
        (["--prompt", "a", "--top-p", "1.5"], ["--top-p is a share"]),
        (["--prompt", "a", "--min-p", "0"], ["--min-p is a share"]),
        (["--prompt", "a", "--temperature", "nan"], ["--temperature"]),
    ],
)
def test_what_cannot_be_asked(cda: Cda, finished: Path, arguments: list[str], words: list[str]) -> None:
    refused = cda("sample", finished, *arguments)
    assert_refused(refused, *words)
    assert refused.out == ""


def test_a_file_without_prompts(cda: Cda, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_refused(cda("sample", finished, "--prompts-file", tmp_path / "empty.txt"), "holds no prompt")


def test_a_seed_beyond_what_a_generator_takes(cda: Cda, finished: Path) -> None:
    """A bound that is named, not an overflow somewhere in PyTorch."""
    refused = cda("sample", finished, "--prompt", "a", "--seed", 10**20)
    assert refused.code == 2, refused.err
    assert "--seed" in refused.err
