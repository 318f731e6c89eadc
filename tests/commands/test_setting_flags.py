"""The flags that the table of settings makes: what they set, what their help names, and what a shell completes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from cda_cli.commands.setting_flags import with_setting_flags
from cda_cli.config import Config
from cda_cli.main import app
from cda_cli.runs.folder import Run
from cda_cli.settings import Side, preset_names
from cda_cli.settings_table import TABLE, Row
from cda_cli.storage import step_folder
from tests.commands.helpers import COMMANDS

WITH_FLAG = [row for row in TABLE.values() if row.setting.flag]
CHOICES = {row.setting.flag: row.values for row in WITH_FLAG if row.values} | {"--split": get_args(Side)}


def flags_of(*arguments: str) -> dict[str, Any]:
    """What a command with the flags of all settings receives from a command line."""
    received: list[dict[str, Any]] = []

    @with_setting_flags
    def command(*, flags: dict[str, Any]) -> None:
        received.append(flags)

    toy = typer.Typer()
    toy.command()(command)
    result = CliRunner().invoke(toy, arguments)
    assert result.exit_code == 0, result.output
    return received[0]


@pytest.mark.parametrize("row", WITH_FLAG, ids=lambda row: row.key)
def test_a_flag_sets_its_settings_and_no_other(row: Row) -> None:
    """A flag that is lost, or that lands in another setting, would train another model without a word."""
    on, _, off = row.setting.flag.partition("/")
    for given, value in [([on], True), ([off], False)] if off else [([on, "1e3"], "1e3")]:
        flags = flags_of(*given)
        for other in WITH_FLAG:
            expected = value if other.setting.flag == row.setting.flag else None
            assert flags[other.key] == expected, f"{' '.join(given)} gave {other.key} the value {flags[other.key]!r}"


def test_settings_without_a_flag_are_left_to_the_other_layers() -> None:
    assert flags_of() == {row.key: None for row in WITH_FLAG}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_and_a_shell_completes_every_value_of_an_option(name: str) -> None:
    """Whoever reads the help does not find a value that it leaves out."""
    options = {option: parameter for parameter in COMMANDS[name].params for option in parameter.opts}
    for option in sorted(options.keys() & CHOICES.keys()):
        help = getattr(options[option], "help", None) or ""
        missing = set(CHOICES[option]) - set(re.findall(r"[\w-]+", help))
        assert not missing, f"the help of cda {name} {option} does not name {', '.join(missing)}"
        assert completed(name, option, "") == list(CHOICES[option])


def completed(*words: str) -> list[str]:
    """What Bash offers for the last of the words after `cda`."""
    given = {"_CDA_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["cda", *words]), "COMP_CWORD": str(len(words))}
    result = CliRunner().invoke(app, env=given, prog_name="cda")
    assert result.exit_code == 0, result.output
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("train", "--attn"), ["--attn-k"]),
        (("train", "--attention", "s"), ["softmax"]),
        (("train", "--track", "wandb,t"), ["wandb,tensorboard", "wandb,trackio"]),
        (("train", "--set", "optim.b"), ["optim.batch_size=", "optim.beta1=", "optim.beta2="]),
        (("train", "--preset", ""), preset_names()),
        (("train", "-p", "t"), ["tiny"]),
        (("train", "--lr", ""), []),
        (("eval", "--split", "v"), ["validation"]),
        (("sample", "--device", "c"), ["cpu", "cuda"]),
        (("train", "--resume", "n"), ["never"]),
        (("presets", "s"), ["seed", "small"]),
        (("config", "drop"), ["dropout"]),
        (("config", "optim.l"), ["optim.lr"]),
        (("config", "-p", "b"), ["base"]),
    ],
)
def test_a_shell_completes_the_word_that_was_begun(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*words) == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("sample", ""), ["runs/a", "runs/b"]),
        (("eval", "ru"), ["runs/a", "runs/b"]),
        (("inspect-sparsity", "runs/b"), ["runs/b"]),
        (("sample", "runs/b/"), ["runs/b/checkpoints/step-00000004", "runs/b/checkpoints/step-00000008"]),
        (("train", "--resume", "runs/b/checkpoints/step-00000008"), ["runs/b/checkpoints/step-00000008"]),
        (("config", "runs/a"), ["runs/a"]),
        (("sample", "elsewhere"), []),
        (("sample", "no/such/place"), []),
    ],
)
def test_a_shell_completes_runs_and_their_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], offered: list[str]
) -> None:
    for name in ("runs/a", "runs/b", "elsewhere/far/down/c"):
        Run(tmp_path / name).path.mkdir(parents=True)
        Run(tmp_path / name).write_config(Config())
    for step in (4, 8):
        step_folder(tmp_path / "runs" / "b", step).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert completed(*words) == offered
