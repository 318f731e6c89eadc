"""`cda config`: which settings it finds, where it says that their values come from, and that its files read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cda_cli.config import Config, flat, resolve
from cda_cli.runs.folder import Run
from cda_cli.settings import SECTIONS, preset_names
from cda_cli.settings_table import SYNONYMS, TABLE
from tests.commands.helpers import Cda, assert_refused


def shown(cda: Cda, *arguments: object) -> dict[str, dict[str, Any]]:
    """The settings that `cda config ARGUMENTS --json` gives, by key."""
    result = cda("config", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return {each["key"]: each for each in json.loads(result.out)["settings"]}


def keys_shown(text: str) -> list[str]:
    """The keys of the lines `section.key = value  (origin)`."""
    return [line.partition(" = ")[0] for line in text.splitlines() if line.partition(" = ")[0] in TABLE]


def test_every_setting_is_there_with_all_that_is_known_of_it(cda: Cda) -> None:
    """Whoever looks for a setting finds it here, or has to read the source."""
    result = cda("config")
    assert (result.code, result.err) == (0, "")
    assert keys_shown(result.out) == list(TABLE)
    words = " ".join(result.out.split())
    assert "optim.lr = 0.003 (preset tiny) Peak learning rate, of Muon and AdamW alike. " in words
    assert (
        "Allowed: number > 0, ≤ 1000. Default: base 0.001, seed 0.0001, small 0.001, tiny 0.003. Flag: --lr." in words
    )
    assert "optim.ema_decay = 0 (default) Decay of a moving average" in words
    assert "Allowed: number ≥ 0, < 1. Default: 0." in words
    assert list(shown(cda)) == list(TABLE)


def test_the_origin_of_each_value_is_the_layer_that_won(cda: Cda, tmp_path: Path) -> None:
    """Default < preset < file < --set < flag, one setting for each layer, which all those before it give too."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: small\noptim: {steps: 200, batch_size: 3}\nrun: {seed: 4, compile: true}\n", encoding="utf-8"
    )
    sets = ("--set", "optim.batch_size=5", "--set", "run.seed=6")
    found = shown(cda, "--config", file, *sets, "--seed", 7, "--no-compile", "--eps", 0.25)
    expected = {
        "optim.clip": (1.0, "default"),
        "optim.warmup_steps": (500, "preset small"),
        "optim.steps": (200, f"file {file}"),
        "optim.batch_size": (5, "--set"),
        "run.seed": (7, "--seed"),
        "run.compile": (False, "--no-compile"),
        "model.attn_eps": (0.25, "--eps"),
        "model.ff_eps": (0.25, "--eps"),
    }
    assert {key: (found[key]["value"], found[key]["from"]) for key in expected} == expected
    assert found["optim.steps"]["presets"] == {name: resolve(name).optim.steps for name in preset_names()}


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("dropout", ["model.dropout"]),
        ("optim", [key for key in TABLE if key.startswith("optim.")]),
        ("optim.beta", ["optim.beta1", "optim.beta2"]),
        ("LR", ["optim.lr", "optim.min_lr_ratio"]),
        ("grad-accum", ["optim.grad_accum"]),
        ("eps", [key for key in TABLE if "eps" in key and "steps" not in key]),
        ("muon", ["optim.optimizer", "optim.lr"]),
        ("fsdp", ["run.parallel"]),
        ("layers", ["model.depth", "model.nope_layers"]),
        ("n-layer", ["model.depth"]),
        (
            "blocks",
            ["model.depth", "model.ff", "model.ff_k", "model.ff_block_size", "optim.optimizer"],
        ),
        ("context", ["model.seq_len"]),
        ("width", ["model.dim", "model.dim_head", "model.ff_mult", "model.ff_width"]),
        ("gqa", ["model.kv_heads"]),
        ("rope-theta", ["model.rotary_base"]),
        ("temperature", ["model.attn_eps", "model.ff_eps", "model.learned_eps", "model.eps_anneal_start"]),
        ("gpu", ["run.device", "run.compile", "run.deterministic", "run.parallel", "run.mesh"]),
        (
            "checkpoint",
            ["run.activation_checkpointing", "run.save_every", "run.save_minutes", "run.keep", "run.keep_best"],
        ),
    ],
)
def test_a_word_finds_settings_by_section_name_and_meaning(cda: Cda, word: str, found: list[str]) -> None:
    """By what it means only where no name holds the word, so that `dropout` is not lost among its mentions.

    Whoever comes from another program finds a setting by a word that is known there.
    """
    assert set(keys_shown(cda("config", word).out)) == set(found)


def test_every_synonym_leads_to_settings() -> None:
    """A name that is mistyped, or that a setting no longer has, would lead nowhere without a word."""
    assert {name for names in SYNONYMS.values() for name in names.split()} <= {row.name for row in TABLE.values()}


def test_several_words_find_what_each_finds(cda: Cda) -> None:
    assert keys_shown(cda("config", "track", "dropout").out) == ["model.dropout", "run.track"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dropuot"], ["'dropuot'", "did you mean 'dropout'?"]),
        (["xyzzy"], ["'xyzzy'", "`cda config` shows all"]),
        (["no/run"], ["no/run is no run and no checkpoint"]),
        (["--preset", "tinny"], ["did you mean 'tiny'?"]),
        (["--set", "optim.lr=0"], ["optim.lr = 0 is not possible"]),
        (["--yaml", "--schema"], ["exclude each other"]),
    ],
)
def test_what_is_wrong_is_refused(cda: Cda, arguments: list[str], words: list[str]) -> None:
    assert_refused(cda("config", *arguments), *words)


def test_its_yaml_is_read_back(cda: Cda, tmp_path: Path) -> None:
    """With texts that need quotes, that go on in further lines, or that hold a comment's mark."""
    sets = [
        "data.source=a # b: 'c'",
        "data.text_column=two\nlines",
        f"data.tokenizer={'long ' * 40}\x85",
        "run.track=wandb",
    ]
    given = [part for line in sets for part in ("--set", line)]
    result = cda("config", "--preset", "seed", "--eps", 0.5, *given, "--yaml")
    file = tmp_path / "back.yaml"
    file.write_bytes(result.out.encode())
    expected = resolve("seed", sets=sets, flags={"model.attn_eps": 0.5, "model.ff_eps": 0.5})
    assert flat(resolve("tiny", file)) == flat(expected)
    assert "  attn_eps: 0.5  # --eps\n" in result.out
    assert "  n_iters: 25  # preset seed\n" in result.out


def test_its_yaml_holds_the_settings_that_were_asked_for(cda: Cda) -> None:
    result = cda("config", "dropout", "--yaml", "--set", "model.dropout=0.1")
    assert result.out == "model:\n  dropout: 0.1  # --set\n"


def test_the_schema_knows_every_setting_its_limits_and_its_words(cda: Cda) -> None:
    """An editor that checks a file by it would else mark what is right, or miss what is wrong."""
    schema = json.loads(cda("config", "--schema").out)
    assert schema["additionalProperties"] is False
    assert schema["properties"].pop("preset")["enum"] == preset_names()
    known = {}
    for section, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        assert definition["additionalProperties"] is False
        known |= {f"{section}.{name}": value for name, value in definition["properties"].items()}
    assert list(known) == list(TABLE)
    for key, row in TABLE.items():
        assert known[key]["description"] == row.meaning
        assert known[key]["default"] == row.default
    assert (known["optim.lr"]["exclusiveMinimum"], known["optim.lr"]["maximum"]) == (0, 1000)
    assert known["model.norm"]["enum"] == ["layernorm", "rmsnorm"]


def test_a_run_shows_what_it_had_and_how_that_differs(cda: Cda, finished: Path) -> None:
    """From the preset that it began from, or from another that is given."""
    result = cda("config", finished, "depth", "clip")
    assert result.code == 0, result.err
    assert result.out.startswith(f"{finished} differs from preset tiny in 1 setting\n")
    assert "model.depth = 2  (run; preset tiny has 4)\n" in result.out
    assert "optim.clip = 1  (run)\n" in result.out
    assert "model.depth = 2  (run; preset base has 12)\n" in cda("config", finished, "depth", "--preset", "base").out


def test_a_run_is_compared_with_the_preset_that_it_began_from(cda: Cda, tmp_path: Path) -> None:
    """Though another is nearer; a run of an older version does not name its own, and is compared with the nearest."""
    near = {key: value for key, value in flat(resolve("base")).items() if value != flat(resolve("tiny"))[key]}
    config = resolve("tiny", flags=near)
    Run(tmp_path / "begun").write_config(config)
    Run(tmp_path / "old").write_config(config.model_copy(update={"preset": None}))
    assert "differs from preset tiny in" in cda("config", tmp_path / "begun", "depth").out
    assert "differs from preset base in 0 settings" in cda("config", tmp_path / "old", "depth").out


def test_a_checkpoint_has_settings_of_its_own(cda: Cda, finished: Path) -> None:
    of_run, of_checkpoint = (shown(cda, path) for path in (finished, finished / "checkpoints" / "step-00000006"))
    written = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    assert of_run == of_checkpoint
    assert {key: each["value"] for key, each in of_run.items()} == {
        f"{section}.{name}": value for section in SECTIONS for name, value in written[section].items()
    }


def test_changed_shows_what_differs_from_the_preset(cda: Cda, finished: Path) -> None:
    assert set(shown(cda, "--preset", "base", "--steps", 5, "--changed")) == {"optim.steps"}
    differing = shown(cda, finished, "--changed")
    assert {"model.depth", "optim.steps", "data.source"} <= set(differing)
    assert all(each["value"] != each["presets"]["tiny"] for each in differing.values())
    table = cda("config", "--preset", "base", "--steps", 5, "--set", "model.depth=3", "--changed").out
    assert [line.split() for line in table.splitlines()] == [
        ["setting", "value", "preset", "base", "from"],
        ["model.depth", "3", "12", "--set"],
        ["optim.steps", "5", "50000", "--steps"],
    ]
    assert cda("config", "--preset", "base", "--changed").out == "all settings are those of preset base\n"


def test_a_run_and_another_start_exclude_each_other(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Which of the two would win is nothing to guess."""
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {steps: 7}\n", encoding="utf-8")
    assert_refused(cda("config", finished, "--config", file), "exclude each other")
    assert_refused(cda("config", finished, finished / "checkpoints" / "step-00000006"), "two runs")


def test_control_characters_of_a_run_do_not_reach_a_terminal(cda: Cda, tmp_path: Path) -> None:
    """A run may come from a stranger."""
    config = Config().model_copy(update={"data": Config().data.model_copy(update={"source": "\x1b[2Jx"})})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    result = cda("config", tmp_path, "source")
    assert "\N{REPLACEMENT CHARACTER}[2Jx" in result.out
    assert "\x1b" not in result.out
