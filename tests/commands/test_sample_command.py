"""`cda sample`: seeds, prompts, and text that cannot harm the terminal that shows it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cda_cli import main
from tests.commands.forked import popen_forked
from tests.commands.helpers import Cda, assert_refused, escapes, metrics

SHORT = ("--max-new-tokens", 12)
# What `str.isprintable` calls unprintable: spaces, joiners, a soft hyphen, line ends, an escape sequence.
SPECIAL = ["a\xa0b\u202fc\u3000d\u200de\u200cf\xadg\r\n", "\u2028i\x0cj\x85k\ufeffl\u202e\N{ESCAPE}[31m"]
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
    """Empty lines are no prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\nsecond λ\n", encoding="utf-8")
    samples = sampled(cda, finished, "--prompts", file, *SHORT)
    assert [sample["prompt"] for sample in samples] == ["first", "second λ"]


def test_equal_prompts_get_different_texts(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Each sample of a call has a seed of its own, with which it can be got again by itself."""
    file = tmp_path / "prompts.txt"
    file.write_text("a\na\n", encoding="utf-8")
    samples = sampled(cda, finished, "--prompts", file, *SHORT, "--num-samples", 2, "--seed", 5)
    assert [sample["seed"] for sample in samples] == [5, 6, 7, 8]
    assert len({sample["text"] for sample in samples}) == 4
    assert sampled(cda, finished, "-p", "a", *SHORT, "--seed", 7) == samples[2:3]


def test_samples_can_be_told_apart_in_a_pipe(cda: Cda, finished: Path) -> None:
    """A heading for a person, a NUL for a program; a single sample is its text alone."""
    ask = ("--prompt", "def\nx", *SHORT)
    first, second = sampled(cda, finished, *ask, "--num-samples", 2)
    texts = ["def\nx" + sample["text"] for sample in (first, second)]
    shown = cda("sample", finished, *ask, "--num-samples", 2)
    assert shown.err == ""
    assert shown.out == (
        f"==> prompt 1, sample 1, seed 0 <==\n{texts[0]}\n\n==> prompt 1, sample 2, seed 1 <==\n{texts[1]}\n"
    )
    assert cda("sample", finished, *ask, "--num-samples", 2, "-0").out == f"{texts[0]}\0{texts[1]}\0"
    assert cda("sample", finished, *ask).out == f"{texts[0]}\n"
    assert_refused(cda("sample", finished, *ask, "--null", "--json"), "--null and --json")


def test_every_prompt_that_is_given_is_sampled(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """As the lines of --prompts are."""
    (tmp_path / "prompts.txt").write_text("ab\ncd\n")
    few = ("--max-new-tokens", 2, "--json")
    given = cda("sample", finished, "-p", "ab", "--prompt", "cd", *few)
    assert given.code == 0, given.err
    assert given.out.count('"prompt"') == 2
    assert given.out == cda("sample", finished, "--prompts", tmp_path / "prompts.txt", *few).out


def test_a_line_of_prompts_ends_at_its_newline_alone(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Other marks that Python splits lines at are characters of the prompt, and a byte order mark is none."""
    prompts = ["one\u2028a", "two\x0cb\x1c", "three\x85c", "four\rd"]
    file = tmp_path / "prompts.txt"
    for start, end in (("", "\n"), ("\ufeff", "\r\n")):
        file.write_bytes((start + end.join([*prompts, "", ""])).encode())
        found = sampled(cda, finished, "--prompts", file, "--max-new-tokens", 1)
        assert [sample["prompt"] for sample in found] == prompts


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_prompts_that_are_no_utf8(cda: Cda, finished: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prompts.txt").write_bytes("é\n".encode(encoding))
    assert_refused(cda("sample", finished, "--prompts", tmp_path / "prompts.txt"), "cannot be read", "UTF-8")


def test_stdin_is_the_prompt_where_none_is_given(cda: Cda, finished: Path) -> None:
    """All of it, line ends included, but for a byte order mark; bytes that are no UTF-8 become marks."""
    [found] = sampled(cda, finished, *SHORT, stdin="\ufefftwo\nlines λ".encode() + b"\xff")
    assert found["prompt"] == "two\nlines λ\N{REPLACEMENT CHARACTER}"
    assert found["text"] == sampled(cda, finished, *SHORT, "--prompt", found["prompt"])[0]["text"]


def test_a_context_that_is_full_goes_on(cda: Cda, finished: Path) -> None:
    """32 tokens of context, and 40 asked for."""
    [found] = sampled(cda, finished, "--prompt", "x" * 32, "--max-new-tokens", 8, "--temperature", 0)
    assert found["text"]


@pytest.mark.parametrize("prompt", SPECIAL)
def test_a_pipe_gets_the_text_as_it_is(finished: Path, cda: Cda, prompt: str) -> None:
    """Character for character, control characters too."""
    ask = ("--prompt", prompt, *RANDOM)
    [found] = sampled(cda, finished, *ask)
    assert found["prompt"] == prompt
    assert "\N{REPLACEMENT CHARACTER}" in found["text"], "the text was not random enough to show anything"
    for flags in ((), ("--no-stream",)):
        assert cda("sample", finished, *ask, *flags).out == prompt + found["text"] + "\n"


def test_json_escapes_control_characters(finished: Path, cda: Cda) -> None:
    assert escapes(cda("sample", finished, "--prompt", "\N{ESCAPE}[31m", *RANDOM, "--json").out) == []


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "utf-16-le"])
def test_a_stdout_that_lacks_characters_gets_escapes_for_them(
    finished: Path, monkeypatch: pytest.MonkeyPatch, cda: Cda, encoding: str
) -> None:
    """What was lost can be read there, and the JSON loses nothing."""
    ask = ("sample", "--device", "cpu", str(finished), "--prompt", "é\xa0あ\r\n", "--max-new-tokens", "1")
    [found] = sampled(cda, finished, *ask[4:])

    def written(*flags: str) -> str:
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "argv", ["cda", *ask, *flags])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline="\r\n"))
        with contextlib.suppress(SystemExit):
            main.run()
        sys.stdout.flush()
        return raw.getvalue().decode(encoding)

    whole = found["prompt"] + found["text"] + "\n"
    assert written() == whole.encode(encoding, errors="backslashreplace").decode(encoding)
    assert json.loads(written("--json"))["samples"] == [found]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_escape_sequences_are_shown_harmlessly_on_a_terminal(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the prompt is dim, by codes of our own; none of the text's may reach it."""
    from cda_cli.console import SampleText
    from cda_cli.data import ByteTokenizer
    from cda_cli.generation import Generated
    from cda_cli.generation.prompts import Prompt, PromptSettings, Sample
    from cda_cli.generation.text import SampledText

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    harmless = "[bold]:smile: \t\xa0\u202f\u3000\u200d\u200c\xad\ufeff"
    evil = "\N{ESCAPE}]0;title\a\N{ESCAPE}[2J\x9b5n\r\u202e" + harmless
    tokenizer = ByteTokenizer()
    sampled = SampledText(Sample(Prompt(evil, PromptSettings()), 1, 1, 0), [1], tokenizer, 9)
    display = SampleText([sampled], stream=True, headings=False)
    for token in tokenizer.encode(f"plain {evil}\n."):
        sampled.take(Generated(0, int(token)))
        display.update()
    sampled.finish("length")
    display.update()
    shown = screen.getvalue()
    safe = "".join("\N{REPLACEMENT CHARACTER}" if c in "\N{ESCAPE}\a\x9b\r\u202e" else c for c in evil)
    assert safe.endswith(harmless)
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
    with popen_forked("sample", finished, "--prompt", "abc", "--max-new-tokens", 2000) as cda:
        assert os.read(cda.stdout.fileno(), 1) == b"a"
        cda.stdout.close()
        assert cda.stderr.read() == ""
        assert cda.returncode == 141, "the exit code of a process whose reader has gone"


def test_the_space_after_the_prompt_is_kept(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A decoder that begins with the first new token takes its space for the beginning of the text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    sentence = "the cat sat on the mat and the dog ran to the cat "
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator([sentence], trainer)
    inner.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text(sentence * 200)
    run = tmp_path / "run"
    trained = cda(
        "train", "--config", tiny, "--data", tmp_path / "text.txt", "--tokenizer", tmp_path / "words.json", "--steps",
        60, "--lr", 0.01, "--set", "run.eval_every=60", "--sample-every", 60, "--out", run,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    ask = ("--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 6)
    [found] = sampled(cda, run, *ask)
    [told] = sampled(cda, run, *ask, "--logprobs", 1)
    assert "".join(token["token"] for token in told["logprobs"]) == found["text"]
    whole = "the cat" + found["text"]
    assert found["text"].startswith(" "), found["text"]
    assert " ".join(whole.split()) in sentence * 2, f"the model learnt nothing: {whole}"
    for flags in ((), ("--no-stream",)):
        assert cda("sample", run, *ask, *flags).out == whole + "\n"
    [sample] = metrics(run, "sample")
    before, after = sample["text"].split("▸")
    assert after.startswith(" ") or not before.endswith(("the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to"))
    assert (before + after).strip()[:40] in sentence * 3


def test_an_argument_that_is_no_utf8_leaves_valid_json(cda: Cda, finished: Path) -> None:
    """Python carries such a byte as a lone surrogate, which has no place in a JSON document."""
    found = cda("sample", finished, "--json", *SHORT, "--prompt", os.fsdecode(b"a\xff"))
    assert json.loads(found.out.encode("utf-8"))["samples"][0]["prompt"] == "a?"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["the prompt is empty", "at least one character"]),
        (["--prompt", "x" * 33], ["33 tokens", "context 32", "shorten"]),
        ([], ["stdin is empty", "--prompt"]),
        (["--prompts", "nowhere"], ["nowhere cannot be read (No such file or directory)", "a prompt a line"]),
        (["--prompts", "."], [". cannot be read (Is a directory)", "a prompt a line"]),
        (["--prompt", "a", "--prompts", "b"], ["exclude each other"]),
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
    assert_refused(cda("sample", finished, "--prompts", tmp_path / "empty.txt"), "holds no prompt")


def test_a_seed_beyond_what_a_generator_takes(cda: Cda, finished: Path) -> None:
    """A bound that is named, not an overflow somewhere in PyTorch."""
    for seed, samples in ((10**20, 1), (2**63, 1), (2**63 - 1, 2)):
        refused = cda("sample", finished, "--prompt", "a", "--seed", seed, "--num-samples", samples)
        assert_refused(refused, f"--seed {seed} is too large for {samples} sample", "give a smaller one")
    assert cda("sample", finished, "--prompt", "a", "--seed", 2**63 - 1, "--max-new-tokens", 1).code == 0
