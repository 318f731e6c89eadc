"""A command line that no command takes is refused in one sentence, as every other error is."""

from __future__ import annotations

import pytest

from tests.commands.helpers import COMMANDS, Cda, assert_refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--stpes", "3"], ["unknown option '--stpes'", "did you mean '--steps'?"]),
        (["eval", "--set", "run.threads=1"], ["unknown option '--set': see `cda eval --help`"]),
        (["train", "--batch", "8"], ["unknown option '--batch'", "did you mean '--batch-size'?"]),
        (["train", "--zzzzzzz"], ["unknown option '--zzzzzzz'", "`cda train --help`"]),
        (["train", "-q"], ["unknown option '-q'", "`cda train --help`"]),
        (["train", "--set", "optim.lr=1", "2"], ["argument '2' has no place", "quotes", "`cda train --help`"]),
        (["inspect-sparsity", "a", "b"], ["argument 'b' has no place"]),
        (["eval"], ["CHECKPOINT|RUN is missing", "`cda eval --help`"]),
        (["train", "--steps"], ["'--steps'", "requires an argument", "`cda train --help`"]),
        (["train", "--dry-run=yes"], ["'--dry-run'", "does not take a value"]),
        (["sample", "x", "--seed", "abc"], ["--seed 'abc' is not possible", "integer", "`cda sample --help`"]),
        (["sample", "x", "--max-new-tokens", "0"], ["--max-new-tokens '0' is not possible", "1"]),
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["frobnicate"], ["unknown command 'frobnicate'", "inspect-sparsity"]),
        (["--foo", "train"], ["unknown option '--foo'", "`cda --help`"]),
        (["--debug"], ["missing command", "`cda --help`"]),
    ],
)
def test_a_command_line_that_cannot_be_read(cda: Cda, arguments: list[str], words: list[str]) -> None:
    refused = cda(*arguments)
    assert_refused(refused, *words)
    assert refused.out == ""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "--steps", "3", "-s", "4"], "--steps"),
        (["train", "--data", "a.txt", "--data", "b.txt"], "--data"),
        (["train", "--compile", "--no-compile"], "--compile/--no-compile"),
        (["eval", "x", "--json", "--json"], "--json"),
        (["config", "--lr", "1", "--lr", "1"], "--lr"),
        (["--debug", "--debug", "presets"], "--debug"),
    ],
)
def test_an_option_is_not_given_twice(cda: Cda, arguments: list[str], name: str) -> None:
    """One of the two values would be lost without a word."""
    assert_refused(cda(*arguments), f"{name} is given twice", "give it once")


def test_a_setting_may_be_set_again(cda: Cda) -> None:
    """--set is a list, of which the later wins, as its help says."""
    assert "optim.lr = 2" in cda("config", "optim.lr", "--set", "optim.lr=1", "--set", "optim.lr=2").out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_wins_over_what_is_wrong(cda: Cda, name: str) -> None:
    """Whoever adds --help to a line that was refused is helped."""
    result = cda(name, "--help", "a", "b")
    assert result.code == 0
    assert "Usage" in result.out
