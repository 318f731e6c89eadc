"""`cda sample` for many prompts: JSON lines, reasons for ending, log-probabilities, batches, full contexts."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cda_cli
from cda_cli import main
from tests.commands.helpers import Cda, assert_refused

FEW = ("--max-new-tokens", 10)
RANDOM = ("--temperature", 100)  # so hot that each byte, also that of the separator, is as likely as any other


def lines(cda: Cda, run: Path, *arguments: object, stdin: bytes | None = None) -> list[dict[str, Any]]:
    result = cda("sample", run, "--jsonl", *arguments, stdin=stdin)
    assert result.code == 0, result.err
    assert result.err == ""
    return [json.loads(line) for line in result.out.splitlines()]


def test_json_lines_in_and_out(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Each line has what its prompt asks for, its own fields, and the text that the options alone would give."""
    asked = [
        {"prompt": "def ", "id": "a"},
        {"prompt": "x", "seed": 7, "temperature": 0.3, "max_new_tokens": 25, "id": {"of": [2]}},
        {"prompt": "return", "num_samples": 2, "logprobs": 1, "repetition_penalty": 2},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    found = lines(cda, finished, "--prompts", tmp_path / "prompts.jsonl", *FEW, "--seed", 3)
    assert [each["prompt"] for each in found] == ["def ", "x", "return", "return"]
    assert [each["seed"] for each in found] == [3, 7, 5, 6]
    assert [each.get("id") for each in found] == ["a", {"of": [2]}, None, None]
    assert ["logprobs" in each for each in found] == [False, False, True, True]
    alone = lines(cda, finished, "x", "--seed", 7, "--temperature", 0.3, "--max-new-tokens", 25)
    assert alone == [{name: value for name, value in found[1].items() if name != "id"}]
    penalised = lines(cda, finished, "return", "--seed", 6, "--repetition-penalty", 2, *FEW)
    assert penalised[0]["text"] == found[3]["text"]


def test_prompts_come_from_anywhere(cda: Cda, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\ntwo\n")
    expected = lines(cda, finished, "one", "two", *FEW)
    assert len(expected) == 2
    for arguments, stdin in (
        (("one", "--prompt", "two"), None),
        (("--prompts", tmp_path / "prompts"), None),
        (("--prompts", "-"), b"one\n\ntwo\r\n"),
        (("--prompts", "-"), b'{"prompt": "one"}\n{"prompt": "two"}\n'),
    ):
        assert lines(cda, finished, *arguments, *FEW, stdin=stdin) == expected


def test_no_batch_size_changes_a_text(cda: Cda, finished: Path) -> None:
    """Not even the order of the lines, though the samples end at different times."""
    ask = ("a", "bcd", "--num-samples", 3, *RANDOM, "--max-new-tokens", 40)
    expected = lines(cda, finished, *ask)
    assert {each["finish_reason"] for each in expected} == {"eos", "length"}, "choose another seed"
    assert lines(cda, finished, *ask, "--batch-size", 1) == expected
    as_text = cda("sample", finished, *ask, "--batch-size", 2, "--null")
    assert as_text.out == "".join(each["prompt"] + each["text"] + "\0" for each in expected)
    for each in expected:
        assert (each["completion_tokens"] < 40) == (each["finish_reason"] == "eos")


def test_a_stop_string_ends_the_text_before_it(cda: Cda, finished: Path) -> None:
    """A token is a byte here, so each stop string crosses the border of a token."""
    [free] = lines(cda, finished, "def ", "--max-new-tokens", 40, "--temperature", 1.5)
    ask = ("def ", "--max-new-tokens", 40, "--temperature", 1.5)
    stop = free["text"][20:23]
    place = free["text"].index(stop)
    [found] = lines(cda, finished, *ask, "--stop", stop, "--stop", "never there")
    assert (found["text"], found["finish_reason"]) == (free["text"][:place], "stop")
    assert found["completion_tokens"] < 40, "it ran on"
    for flag in ("--stream", "--no-stream"):
        assert cda("sample", finished, *ask, "--stop", stop, flag).out == "def " + found["text"] + "\n"
    assert lines(cda, finished, *ask, "--stop", "never there") == [free]


def test_log_probabilities_are_those_of_the_model(cda: Cda, finished: Path) -> None:
    """They are those of its own logits, whatever the temperature and the filters. A token may be no whole character."""
    [found] = lines(cda, finished, "self.", *FEW, "--logprobs", 3, "--temperature", 0.9, "--top-k", 20)
    model = cda_cli.load(finished, device="cpu")
    logprobs = found["logprobs"]
    assert len(logprobs) == found["completion_tokens"]
    drawn = [each["token_id"] for each in logprobs]
    assert model.tokenizer.decode(drawn) == found["text"]
    ids = torch.tensor([[*map(int, model.tokenizer.encode("self.")), *drawn]])
    with torch.no_grad():
        expected = model.model(ids)[0, -len(drawn) - 1 : -1].log_softmax(-1)
    logprob = expected.gather(1, ids[0, -len(drawn) :, None])[:, 0].tolist()
    assert [each["logprob"] for each in logprobs] == pytest.approx(logprob, abs=1e-4)
    for each in logprobs:
        likeliest = [other["logprob"] for other in each["top_logprobs"]]
        assert len(likeliest) == 3
        assert likeliest == sorted(likeliest, reverse=True)
        assert each["logprob"] <= likeliest[0]
    [greedy] = lines(cda, finished, "self.", *FEW, "--logprobs", 1, "--temperature", 0)
    for each in greedy["logprobs"]:
        assert [{name: each[name] for name in ("token", "token_id", "logprob")}] == each["top_logprobs"]
    assert_refused(cda("sample", finished, "self.", "--logprobs", 1), "--logprobs is told in JSON alone")


def test_what_is_longer_than_the_context(cda: Cda, finished: Path) -> None:
    """32 tokens. It is refused, or the model reads a part of it, and both are said."""
    prompt = "abcdefgh" * 5
    assert_refused(cda("sample", finished, prompt), "40 tokens", "context 32", "--context-shift")
    assert_refused(cda("sample", finished, "a", prompt), "prompt 2 has 40 tokens")
    [long] = lines(cda, finished, prompt, *FEW, "--context-shift")
    [short] = lines(cda, finished, prompt[-32:], *FEW)
    assert long["text"] == short["text"]
    assert long["truncated"]
    assert (long["prompt"], long["prompt_tokens"]) == (prompt, 40)
    [ended] = lines(cda, finished, prompt[:30], *FEW, "--no-context-shift")
    [going_on] = lines(cda, finished, prompt[:30], *FEW)
    assert (ended["finish_reason"], ended["truncated"], ended["completion_tokens"]) == ("context", False, 3)
    assert (going_on["finish_reason"], going_on["truncated"]) == ("length", True)
    assert going_on["text"].startswith(ended["text"])
    shown = cda("sample", finished, prompt[:30], *FEW)
    assert shown.err == "1 of 1 sample grew beyond the model's context; the model went on from the newest tokens\n"
    shown = cda("sample", finished, prompt[:30], *FEW, "--no-context-shift")
    assert shown.err == "1 of 1 sample ended because the model's context was full\n"


def test_a_terminal_is_told_the_speed_and_a_pipe_gets_the_samples(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a bar is drawn on stderr, which is a terminal here, stdout is not."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    command = ["cda", "sample", "--device", "cpu", str(finished), "a", "--num-samples", "3", "--jsonl"]
    monkeypatch.setattr(sys, "argv", [*command, *map(str, FEW)])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit):
        main.run()
    assert [json.loads(line)["seed"] for line in out.getvalue().splitlines()] == [0, 1, 2]
    assert "sampling" in err.getvalue()
    assert "3/3" in err.getvalue()
    assert re.search(r"30 tokens, [\d.]+ k? ?tokens/s; ended: 3 by length", err.getvalue())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "--batch-size", 0), ["--batch-size '0' is not possible; give auto, or a number from 1 on"]),
        (("a", "--batch-size", "many"), ["--batch-size 'many'"]),
        (("a", "--json", "--jsonl"), ["--json and --jsonl exclude each other"]),
        (("a", "--stop", ""), ["--stop is empty"]),
        (("a", "--repetition-penalty", 0), ["--repetition-penalty must be above 0"]),
        (("a", "--presence-penalty", "nan"), ["--presence-penalty must be finite"]),
    ],
)
def test_what_cannot_be_asked(cda: Cda, finished: Path, arguments: tuple[object, ...], words: list[str]) -> None:
    assert_refused(cda("sample", finished, *arguments), *words)


def test_with_fewer_keys_it_tells_how_many_were_read(cda: Cda, finished: Path) -> None:
    """A short text is one page, of which all is read; and more keys than the context has are all keys."""
    expected = cda("sample", finished, "def ", *FEW)
    auto = cda("sample", finished, "def ", *FEW, "--max-keys", "auto", "--tolerance", 0.1)
    assert (auto.code, auto.out) == (0, expected.out)
    assert re.search(r"a head read (\d+) of \1 keys for a token, and left out at most 0.0% of a row's weight", auto.err)
    assert cda("sample", finished, "def ", *FEW, "--max-keys", 128) == expected
    one_token = cda("sample", finished, "def ", "--max-new-tokens", 1, "--max-keys", "auto")
    assert (one_token.code, one_token.err) == (0, ""), "no step read any keys"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-keys", "127"), ("auto", "from 128 on")),
        (("--max-keys", "few"), ("auto", "from 128 on")),
        (("--max-keys", "256", "--tolerance", 0.1), ("--max-keys auto", "leave --tolerance out")),
        (("--tolerance", 0.1), ("--max-keys auto", "leave --tolerance out")),
        (("--max-keys", "auto", "--tolerance", 1), ("below 1", "not 1.0")),
    ],
)
def test_a_choice_of_keys_without_meaning_is_refused(
    cda: Cda, finished: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_refused(cda("sample", finished, "x", *options), *words)
