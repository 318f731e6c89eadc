"""What the text of a setting means, in a file and in --set: the setting decides, not the look of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.config import dump_yaml, flat, parse, resolve
from cda_cli.errors import ConfigError

STEPS = "optim.steps"
# Text, and the whole number that a person means by it; None where it is none.
WHOLE_NUMBERS = [
    ("1000", 1000), ("1e3", 1000), ("1E3", 1000), ("1000.0", 1000), ("1_000", 1000), ("010", 10), ("+7", 7),
    ("  12  ", 12), ("0.5e1", 5), ("'8'", 8), ("true", None), ("yes", None), ("on", None), ("1:30", None),
    ("0x10", None), ("0o17", None), ("0b11", None), ("2.5", None), ("inf", None), (".inf", None), ("nan", None),
    ("null", None), ("~", None), ("", None), ("2024-01-01", None), ("1 000", None), ("1,000", None),
    ("12 # or 13", None), ("[3]", None), ("{a: 1}", None), ("!!int 3", None), ("!!python/name:os.system x", None),
    ("1e-3", None),
]  # fmt: skip
REAL_NUMBERS = [
    ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("1e-3", 1e-3), ("1.5e2", 150.0), ("010.5", 10.5), ("3", 3.0),
    ("true", None), ("off", None), ("1:30.5", None), ("1e400", None), ("0,5", None),
]  # fmt: skip
SWITCHES = [
    ("true", True), ("True", True), ("yes", True), ("on", True), ("false", False), ("no", False), ("OFF", False),
    ("1", None), ("0", None), ("1.0", None), ("'1'", None), ("null", None), ("2", None), ("01", None), ("si", None),
]  # fmt: skip
# Where text is wanted these are text: YAML would make something else of them, or nothing at all.
TEXTS = [
    "010", "1:30", "1e3", "1.5e3", "true", "yes", "on", "null", "~", "", "2024-01-01", "a#b", "a #b", "# a", "a: b",
    "*a", "&a", "!a", "@a", "%a", "`a", "{a", "[a", "- a", "?", "=", "<<", " a ", "'a'", '"a', "a\tb", "a\nb",
    "hf:a/b:c", "C:\\a", "|", ">", "---", "...", "0x10", "1_000", ".5", "inf", ".nan", "\ufeffa", "日本", "a=b",
    "\x85", "\u2028",
]  # fmt: skip


def in_set(name: str, text: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(resolve(sets=[f"{name}={text}"]), section), key)


def in_file(folder: Path, name: str, text: str) -> Any:
    section, key = name.split(".")
    path = folder / "given.yaml"
    path.write_text(f"{section}:\n  {key}: {text}\n", encoding="utf-8")
    return getattr(getattr(resolve(file=path), section), key)


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        (name, *one)
        for name, cases in ((STEPS, WHOLE_NUMBERS), ("optim.lr", REAL_NUMBERS), ("model.learned_k", SWITCHES))
        for one in cases
    ],
)
def test_numbers_and_switches_are_what_a_person_means(tmp_path: Path, name: str, text: str, meant: object) -> None:
    """In a file as in --set; and what could be meant in two ways is refused, in one sentence that names the setting."""
    ways = {"--set": lambda: in_set(name, text), "file": lambda: in_file(tmp_path, name, text)}
    if "#" in text:
        del ways["file"]  # there it begins a comment
    for way, read in ways.items():
        if meant is not None:
            found = read()
            assert found == meant, way
            assert type(found) is type(meant), way
            continue
        with pytest.raises(ConfigError) as refusal:
            read()
        assert "\n" not in str(refusal.value)
        assert name in str(refusal.value) or "not valid YAML" in str(refusal.value), way


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    """A path is what --set says, to the last character; and so it is read again from the file that a run writes."""
    config = resolve(sets=[f"data.source={text}", f"data.text_column={text}"])
    assert config.data.source == config.data.text_column == text
    path = tmp_path / "written.yaml"
    path.write_bytes(dump_yaml(config).encode())
    assert flat(resolve(file=path)) == flat(config)


@pytest.mark.parametrize("text", ["010", "1:30", "1e3", "true", "yes", "2024-01-01", "a#b", "1_000", ".5", "0x10", "="])
def test_text_in_a_file_needs_no_quotes_for_its_look(tmp_path: Path, text: str) -> None:
    assert in_file(tmp_path, "data.source", text) == text
    assert in_file(tmp_path, "data.source", f"'{text}'") == text


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("optim:\n  lr: 1.0e-3\noptim:\n  steps: 5\n", "optim", (1, 3)),
        ("optim:\n  lr: 0.1\n  steps: 5\n  lr: 0.2\n", "lr", (2, 4)),
        ("optim: {lr: 0.1, lr: 0.1}\n", "lr", (1, 1)),
        ("optim:\n  lr: 0.1\n  'lr': 0.2\n", "lr", (2, 3)),
        ("preset: tiny\nrun: {seed: 1}\npreset: base\n", "preset", (1, 3)),
        ("base: &x\n  seed: 1\n  seed: 2\nrun: *x\n", "seed", (2, 3)),
        ("run:\n  track: [{a: 1, a: 2}]\n", "a", (2, 2)),
        ("run:\n  <<: {seed: 1}\n  <<: {seed: 2}\n", "<<", (2, 3)),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, key: str, lines: tuple[int, int]) -> None:
    """One of the two would be dropped without a word."""
    path = tmp_path / "twice.yaml"
    path.write_text(text, encoding="utf-8")
    words = (
        f"{path} is not valid YAML ('{key}' is given in line {lines[0]} and again in line {lines[1]}); mend it, or "
        "give --config another file"
    )
    with pytest.raises(ConfigError) as refusal:
        resolve(file=path)
    assert str(refusal.value) == words


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    """That is what YAML's merging is for."""
    path = tmp_path / "merged.yaml"
    path.write_text("optim: &o {lr: 0.5, steps: 7}\nrun: {<<: {seed: 3}, seed: 4}\n", encoding="utf-8")
    config = resolve(file=path)
    assert (config.optim.lr, config.optim.steps, config.run.seed) == (0.5, 7, 4)


def test_an_old_configuration_still_opens(tmp_path: Path) -> None:
    """As PyYAML writes it, for which 1e3 and 08 are text without quotes."""
    config = parse({"data": {"source": "1e3", "text_column": "08", "split": "0o7"}, "optim": {"lr": 1e-5, "steps": 10}})
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert "source: 1e3" in path.read_text(encoding="utf-8")
    assert flat(resolve(file=path)) == flat(config)


FLOATS = st.floats(1e-300, 1e3, exclude_min=True)
NASTY = (
    st.text() | st.sampled_from(TEXTS) | st.text(st.sampled_from("01.e_-+:#~ \t\n'\"[]{}&*!|>%@`,?nulltrueonx\x85\r"))
)
SOME = st.fixed_dictionaries(
    {},
    optional={
        "data": st.fixed_dictionaries({}, optional={"source": NASTY, "text_column": NASTY, "tokenizer": NASTY}),
        "optim": st.fixed_dictionaries(
            {},
            optional={"lr": FLOATS, "weight_decay": st.floats(0, 1e300), "schedule_steps": st.none() | st.integers(1)},
        ),
        "model": st.fixed_dictionaries({}, optional={"attn_eps": FLOATS, "learned_k_bias": st.floats(-1e9, 1e9)}),
        "run": st.fixed_dictionaries(
            {},
            optional={
                "compile": st.none() | st.booleans(),
                "seed": st.integers(0, 2**63 - 1),
                "track": st.lists(st.sampled_from(["tensorboard", "wandb", "trackio"])),
            },
        ),
    },
)


@pytest.mark.slow
@given(SOME)
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    """Through a file, whatever the strings hold and however fine the numbers are; all of it, with no preset below."""
    config = parse(values)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_bytes(dump_yaml(config).encode())
    assert flat(resolve("base", path)) == flat(config)


@given(NASTY)
def test_any_text_can_be_set(text: str) -> None:
    assert in_set("data.source", text) == text
