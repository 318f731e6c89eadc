"""`cda` itself: help, version, exit codes, and what is not imported before it is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cda_cli import __version__, errors
from tests.commands.helpers import COMMANDS, Cda, assert_refused, environment, in_subprocess
from tests.comparison.runs import write_run

# Importing these takes so long that --help is no longer instant.
HEAVY = {"torch", "datasets", "numpy", "tokenizers", "safetensors", "triton"}
# Runs a command, and tells at the end what it has imported.
AND_TELL = (
    "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules)); from cda_cli.main import run; run()"
)


def in_fresh_interpreter(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [[], ["train"], ["doctor"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """Importing PyTorch takes seconds, for which a person who asks for help would wait."""
    done = in_fresh_interpreter(AND_TELL, *command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    loaded = set(done.stdout[done.stdout.index("LOADED") :].split())
    assert "cda_cli.main" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", ["config", "presets", "runs"])
def test_what_only_looks_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    """It answers at once, as `ls` does."""
    done = in_fresh_interpreter(AND_TELL, command, *[str(tmp_path)] * (command == "runs"))
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "cda_cli.console" in loaded
    assert not loaded & HEAVY


def test_records_are_compared_without_what_is_heavy(tmp_path: Path) -> None:
    """Only the models need PyTorch, and --no-eval leaves them out."""
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    done = in_fresh_interpreter(AND_TELL, "compare", *runs, "--no-eval")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "cda_cli.comparison.curves" in loaded
    assert not loaded & HEAVY


def test_a_wrong_setting_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    done = in_fresh_interpreter(AND_TELL, "train", "--out", str(tmp_path / "run"), "--solver", "exat")
    assert done.returncode == 2
    assert not set(done.stdout.split()) & HEAVY


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_do_not_spin_while_they_wait(
    cda: Cda, monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    """On two busy cores a step of the tiny model took 6.3 s with threads that spin, and 0.7 s with threads that sleep.

    torch reads the variable when it is imported, which neither --help nor --version does.
    """
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert cda("--version").code == 0
    assert os.environ["OMP_WAIT_POLICY"] == used


@pytest.mark.parametrize("name", COMMANDS)
def test_help_mentions_every_option(cda: Cda, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the help does not find an option that it leaves out or cuts off."""
    monkeypatch.setenv("COLUMNS", "200")
    command = COMMANDS[name]
    result = cda(name, "--help")
    assert result.code == 0
    for parameter in command.params:
        spellings = [*parameter.opts, *parameter.secondary_opts]
        for spelling in (s for s in spellings if s.startswith("-")):
            assert spelling in result.out, f"cda {name} --help does not mention {spelling}"
    assert command.help
    assert command.help.split(":")[0].split()[0] in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_splits_no_value_in_a_narrow_terminal(cda: Cda, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half of a word in the next line cannot be read, or looked for."""
    monkeypatch.setenv("COLUMNS", "80")
    words = set(cda(name, "--help").out.split())
    for parameter in COMMANDS[name].params:
        assert set((parameter.metavar or "").split()) <= words, f"{parameter.name} is torn"
    assert not [word for word in words if re.search(r"\w…", word)], "a word is cut off"
    assert not [word for word in words if len(word) > 12 and word.strip("[]x<>=").isdigit()], "an endless number"


def test_help_of_all_names_every_command(cda: Cda) -> None:
    result = cda("--help")
    assert result.code == 0
    for name in COMMANDS:
        assert name in result.out
    assert cda("-h").out == result.out


def test_no_command_is_wrong_usage_with_the_help(cda: Cda) -> None:
    result = cda()
    assert result.code == 2
    assert "Usage" in result.out + result.err


def test_the_version(cda: Cda) -> None:
    assert cda("--version") == (0, f"cda {__version__}\n", "")


def test_debug_shows_the_traceback() -> None:
    """Without --debug an error is one sentence; with it, it shows all that the report of a fault needs."""
    wrong = ("train", "--attn-k", "0")
    plain = subprocess.run(in_subprocess(*wrong), capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    debug = subprocess.run(in_subprocess("--debug", *wrong), capture_output=True, text=True, check=False)
    assert debug.returncode == 2, "the exit code is that of the error"
    assert "Traceback" in debug.stderr
    assert "ConfigError: model.attn_k" in debug.stderr


def test_debug_is_of_one_call(cda: Cda) -> None:
    wrong = ("train", "--attn-k", "0")
    assert "Traceback" in cda("--debug", *wrong).err
    assert_refused(cda(*wrong), "model.attn_k = 0")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.DataError("x"), 2),
        (errors.CheckpointError("x"), 2),
        (errors.StorageError("x"), 2),
        (errors.DeviceError("x"), 2),
        (errors.TrainingError("x"), 1),
        (errors.CheckFailedError("x"), 3),
        (errors.InterruptedRunError("x", 2), 130),
        (errors.InterruptedRunError("x", 15), 143),
    ],
)
def test_exit_codes(error: errors.CdaError, code: int) -> None:
    """A script decides by the exit code whether to try again."""
    assert error.exit_code == code


def test_a_terminal_without_unicode_is_served() -> None:
    """A question mark in place of ≥ is better than an error, above all in the middle of training."""
    ascii_only = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(in_subprocess("config"), env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b" ? " in done.stdout
    assert done.stdout.isascii()
