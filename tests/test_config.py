"""The configuration: which layer wins, what a wrong setting is told, and that what is written reads back."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import ValidationError

from cda_cli.config import (
    Config,
    ModelConfig,
    annealed_eps,
    dump_yaml,
    flat,
    parse,
    resolve,
)
from cda_cli.data.row_readers import KINDS, PACKED, TEXT_ENDINGS
from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.model import Transformer, expected_tensors
from cda_cli.ops import Backend, Solver
from cda_cli.settings import PRESET_FOLDER, SECTIONS, preset_names
from cda_cli.settings_table import TABLE, Row

ROOT = Path(__file__).parent.parent
PRESETS = ["base", "seed", "small", "tiny"]


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def of_preset(name: str, section: str, key: str) -> Any:
    return yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))[section][key]


def test_each_layer_beats_the_one_before_it(tmp_path: Path) -> None:
    """Default < preset < file < --set < flags; one setting is given by each layer but those before it."""
    file = write(tmp_path, "optim: {lr: 0.2, steps: 200, grad_accum: 20}")
    sets = ["optim.steps=300", "optim.grad_accum=30", "optim.grad_accum=31"]
    optim = resolve("tiny", file, sets, {"optim.grad_accum": 40}).optim
    assert optim.clip == Config().optim.clip
    assert optim.batch_size == of_preset("tiny", "optim", "batch_size") != Config().optim.batch_size
    assert optim.lr == 0.2 != of_preset("tiny", "optim", "lr")
    assert optim.steps == 300
    assert optim.grad_accum == 40
    assert resolve("tiny", file, sets).optim.grad_accum == 31, "the later --set wins"


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    flags = {"model.dim": None, "run.compile": None, "optim.schedule_steps": None}
    assert resolve("small", flags=flags) == resolve("small")
    assert resolve("small", flags={"run.compile": False}).run.compile is False, "False is given, None is not"
    assert resolve("small", flags={"run.eval_every": 0}).run.eval_every == 0, "0 is given, None is not"


def test_set_can_take_a_value_away() -> None:
    """null in YAML is a value: the setting is given, as nothing."""
    assert resolve("seed").model.dim_head == 64
    assert resolve("seed", sets=["model.dim_head=null"]).model.dim_head is None


def test_a_list_is_read_as_people_write_it(tmp_path: Path) -> None:
    """With commas, as YAML, or alone."""
    for text, layers in (("0, 2", [0, 2]), ("[0, 2]", [0, 2]), ("2", [2]), ("[]", []), ("", [])):
        assert resolve(sets=[f"model.nope_layers={text}"] if text else []).model.nope_layers == layers
        assert (
            resolve(file=write(tmp_path, f"model: {{nope_layers: '{text.strip('[]')}'}}")).model.nope_layers == layers
        )


def test_which_preset_it_starts_from(tmp_path: Path) -> None:
    """Of the argument, else of the file, else tiny."""
    bare, named = write(tmp_path, "optim: {steps: 7}"), write(tmp_path, "preset: base\noptim: {steps: 7}", "named.yaml")
    steps = {"optim.steps": 7}
    assert resolve() == resolve("tiny")
    assert resolve(file=bare) == resolve("tiny", flags=steps)
    assert resolve(file=named) == resolve("base", flags=steps)
    assert resolve("small", named) == resolve("small", flags=steps)
    assert resolve(file=write(tmp_path, "# nothing yet\n", "empty.yaml")) == resolve("tiny")


def test_the_settings_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Stand in for the preset, where none is named: neither as an argument nor by a file."""
    base = resolve("small", flags={"optim.steps": 11, "run.seed": 5})
    assert resolve(base=base) == base
    assert resolve(base=base, flags={"optim.steps": 12}, sets=["run.seed=6"]).run.seed == 6
    assert resolve(base=base, flags={"optim.steps": 12}).model == base.model
    assert resolve("tiny", base=base) == resolve("tiny")
    assert resolve(file=write(tmp_path, "run: {seed: 3}"), base=base) == resolve("tiny", flags={"run.seed": 3})


def test_numbers_are_read_as_people_write_them() -> None:
    """YAML 1.1 takes 1e-3 for a string."""
    config = resolve(sets=["optim.lr=1e-3", "model.attn_eps=.5", " model.dim = 64 ", "run.compile=on"])
    assert (config.optim.lr, config.model.attn_eps, config.model.dim, config.run.compile) == (1e-3, 0.5, 64, True)


BAD_SETS = [
    ("model.dim=130", "model.dim 130 is not divisible by model.heads 4; choose a multiple of 4, or set model.dim_head"),
    ("model.dim_head=3", "rotary positions turn pairs, and a head is 3 wide; choose an even model.dim_head"),
    ("model.kv_heads=3", "model.heads 4 is not divisible by model.kv_heads 3; choose a divisor of 4, or null"),
    ("model.nope_layers=1,4", "model.nope_layers 1,4 names a layer that there is not; choose from 0 to 3"),
    ("model.nope_layers=-1", "model.nope_layers -1 names a layer that there is not; choose from 0 to 3"),
    ("model.nope_layers=1;2", "model.nope_layers.0 = '1;2' is not possible: input should be a valid integer"),
    (
        "model.rotary_high_freq_factor=1",
        "model.rotary_high_freq_factor must be larger than model.rotary_low_freq_factor; change one of them",
    ),
    ("model.rotary_beta_slow=32", "model.rotary_beta_fast must be larger than model.rotary_beta_slow; change one of"),
    (
        "model.rotary_factor=0.5",
        "model.rotary_factor = 0.5 is not possible: input should be greater than or equal to 1",
    ),
    ("model.norm_eps=0", "model.norm_eps = 0 is not possible: input should be greater than 0"),
    ("model.ff_mult=0.001", "model.ff_mult 0.001 leaves the feed-forward no units; make it larger"),
    ("model.attn_k=0.5", "a learned k runs from 1 to attn_k, which is 0.5; set attn_k to 1 or more"),
    ("model.attn_eps=0", "model.attn_eps = 0 is not possible: input should be greater than 0"),
    ("model.ff_eps=-1", "model.ff_eps = -1 is not possible: input should be greater than 0"),
    ("model.attn_k=0", "model.attn_k = 0 is not possible: input should be greater than 0"),
    ("model.ff_k=-2.5", "model.ff_k = -2.5 is not possible: input should be greater than 0"),
    ("model.eps_anneal_start=0", "model.eps_anneal_start = 0 is not possible: input should be greater than 0"),
    ("model.eps_anneal_begin=1", "model.eps_anneal_begin = 1 is not possible: input should be less than 1"),
    ("model.attn_eps=inf", "model.attn_eps = inf is not possible: input should be a finite number"),
    ("model.attn_eps=.inf", "model.attn_eps = '.inf' is not possible: input should be a valid number"),
    ("optim.lr=nan", "optim.lr = nan is not possible: input should be a finite number"),
    ("optim.lr=fast", "optim.lr = 'fast' is not possible: input should be a valid number; `cda config optim.lr`"),
    ("model.depth=2.5", "model.depth = 2.5 is not possible: input should be a valid integer"),
    ("model.dim=", "model.dim = None is not possible: input should be a valid integer"),
    (
        "model.attention=soft",
        "model.attention = 'soft' is not possible: input should be 'softmax', 'coordinate-descent', '",
    ),
    ("run.keep=1", "run.keep = 1 is not possible: input should be greater than or equal to 2"),
    ("model.learned_k=perhaps", "model.learned_k = 'perhaps' is not possible: input should be a valid boolean"),
    ("run.parallel=[1]", "run.parallel = ['1'] is not possible: input should be 'ddp', 'fsdp' or 'cp'"),
    ("run.mesh=2x2", "run.mesh '2x2' is no mesh; give one such as dp=2,cp=2 or cp=2"),
    ("model.atn_k=2", "unknown setting 'model.atn_k': did you mean 'model.attn_k'?"),
    ("optim.learning=1", "unknown setting 'optim.learning': did you mean 'optim."),
    ("model.layers=2", "unknown setting 'model.layers': did you mean 'model.depth'?"),
    ("optim.learning_rate=1", "unknown setting 'optim.learning_rate': did you mean 'optim.lr'?"),
    ("modle.dim=64", "unknown section 'modle': did you mean 'model'?"),
    ("xyzzy.dim=64", "unknown section 'xyzzy': known: data, model, optim, run"),
    ("model.dim.x=64", "unknown setting 'model.dim.x': did you mean 'model.dim'?"),
    ("model.dim", "--set takes section.key=value, not 'model.dim'"),
    ("dim=64", "a setting is named section.key, such as optim.lr, not 'dim'"),
    ("=64", "a setting is named section.key, such as optim.lr, not ''"),
    ("run.track=[a", "the value of --set 'run.track=[a' is not valid YAML; put quotes around it"),
    ("model.dim=a: b: c", "the value of --set 'model.dim=a: b: c' is not valid YAML; put quotes around it"),
    ("model.dim={a: 1, a: 2}", "the value of --set 'model.dim={a: 1, a: 2}' is not valid YAML; put quotes around it"),
]
BAD_FILES = [
    ("model: [1, 2", "is not valid YAML (line 1: expected ',' or ']', but got '<stream end>'); mend it, or give"),
    ("\tmodel: 3", "is not valid YAML ("),
    ("- model", "does not hold the sections model, data, optim, run; mend it"),
    ("just words", "does not hold the sections model, data, optim, run; mend it"),
    ("model: 3", "section 'model' holds settings, not '3'; write model.key=value"),
    ("model:", "section 'model' holds settings, not None; write model.key=value"),
    ("optim: [lr, 1]", "section 'optim' holds settings, not ['lr', '1']; write optim.key=value"),
    ("run: {sede: 1}", "unknown setting 'run.sede': did you mean 'run.seed'?"),
    ("1: {dim: 3}", "unknown section '1': known: data, model, optim, run"),
    ("model: {1: 2}", "unknown setting 'model.1': did you mean 'model."),
    ("optimizer: {lr: 1}", "unknown section 'optimizer': did you mean 'optim'?"),
    ("preset: smal", "unknown preset 'smal': did you mean 'small'?"),
    ("preset: 3", "unknown preset '3': known: base, seed, small, tiny"),
    ("preset: [tiny]", "unknown preset ['tiny']: did you mean 'tiny'?"),
    ("model: {dim: !!python/object/apply:os.system [echo]}", "is not valid YAML ("),
]


def sentence(refusal: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(refusal.value)
    assert "\n" not in text, "more than one line"
    assert refusal.value.exit_code == 2
    assert not any(word in text for word in ("pydantic", "Traceback", "ValidationError", "https://")), text
    return text


@pytest.mark.parametrize(("line", "start"), BAD_SETS, ids=[line for line, _ in BAD_SETS])
def test_a_setting_without_meaning_is_one_sentence_with_its_remedy(line: str, start: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(sets=[line])
    assert sentence(refusal).startswith(start)


@pytest.mark.parametrize(("text", "part"), BAD_FILES, ids=[text for text, _ in BAD_FILES])
def test_a_file_without_meaning_is_one_sentence_with_its_remedy(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(file=write(tmp_path, text))
    assert part in sentence(refusal)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path, part in (
        (tmp_path / "none.yaml", "there is no configuration file {}; check the path given to --config"),
        (tmp_path, "{} cannot be read ("),
        (binary, "{} cannot be read ("),
        (write(tmp_path, "a: \x07", "bell.yaml"), "{} is not valid YAML ("),
    ):
        with pytest.raises(ConfigError) as refusal:
            resolve(file=path)
        assert sentence(refusal).startswith(part.format(path))


def test_an_unknown_preset_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^unknown preset 'tinny': did you mean 'tiny'\?$"):
        resolve("tinny")
    with pytest.raises(ConfigError, match=r"^unknown preset '../tiny': "):
        resolve("../tiny")


def test_the_nearest_name_or_all_of_them() -> None:
    assert did_you_mean("stpes", ["steps", "seed"]) == "did you mean 'steps'?"
    assert did_you_mean("qqq", ["steps", "seed"]) == "known: seed, steps"


def test_a_section_is_not_half_taken_over() -> None:
    """A checkpoint's settings are complete: one that has others is not of this version."""
    with pytest.raises(ConfigError, match=r"^unknown setting 'model\.colour': "):
        parse({"model": {"colour": 1}})
    assert parse({}) == Config()


def test_the_configuration_does_not_change_under_those_who_hold_it() -> None:
    config = resolve()
    with pytest.raises(ValidationError, match="frozen"):
        config.model.dim = 3  # type: ignore[misc]


def test_the_presets_are_these() -> None:
    assert preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_builds(name: str) -> None:
    config = resolve(name)
    with torch.device("meta"):
        model = Transformer(config.model)
    assert model.parameter_count() == parameters(config.model)


def parameters(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape, _ in expected_tensors(model).values())


def test_the_presets_are_as_large_as_they_say() -> None:
    """The figures of their first lines."""
    base, small = resolve("base").model, resolve("small").model
    assert round(parameters(base) / 1e6) == 85
    assert round(parameters(base.model_copy(update={"vocab_size": 50257})) / 1e6) == 124
    assert round(parameters(small) / 1e6) in (25, 26)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_written_reads_back(name: str, tmp_path: Path) -> None:
    assert flat(resolve("seed", write(tmp_path, dump_yaml(resolve(name))))) == flat(resolve(name))


def test_a_configuration_records_the_preset_that_it_began_from(tmp_path: Path) -> None:
    """A run goes on with the one that it has; an older run has none, and another version's may be unknown here."""
    assert (resolve().preset, resolve("base").preset) == ("tiny", "base")
    named = write(tmp_path, "preset: small\noptim: {lr: 0.5}")
    assert resolve(file=named).preset == "small"
    assert resolve("base", named).preset == "base"
    for begun in (resolve("small"), parse({"optim": {"lr": 0.5}})):
        assert resolve(sets=["optim.steps=7"], base=begun).preset == begun.preset
        assert parse(yaml.safe_load(dump_yaml(begun))) == begun
    assert [parse({"preset": name}).preset for name in ("huge", 3, ["tiny"], None)] == [None] * 4


def test_every_setting_stands_in_the_table() -> None:
    """A field that a section of the configuration adds would have no flag, no help and no line in the docs."""
    fields = [f"{section}.{name}" for section in SECTIONS for name in type(getattr(Config(), section)).model_fields]
    assert fields == list(TABLE)


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_every_setting_says_what_it_means(row: Row) -> None:
    assert len(row.setting.help.split()) > 1
    assert row.setting.help.endswith((".", "…"))


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.setting.flag], ids=lambda row: row.key)
def test_the_help_of_a_flag_shows_a_default_where_the_presets_agree_on_it(row: Row) -> None:
    values = {str(getattr(getattr(resolve(name), row.section), row.name)) for name in PRESETS}
    assert row.setting.by_preset == (values != {str(row.default)}), f"the presets say {values}"


def test_the_operator_has_the_same_names_as_the_settings() -> None:
    """ops holds its own, as it can be lifted out: it imports nothing of the rest of the package."""
    assert TABLE["run.backend"].values == get_args(Backend)
    assert TABLE["model.solver"].values == get_args(Solver)


def test_the_kinds_of_text_files_are_those_that_are_read() -> None:
    endings = set(re.findall(r"\.\w+", TABLE["data.source"].setting.help))
    expected = {*KINDS, *PACKED} - {*TEXT_ENDINGS}  # which the help calls "any text"
    assert endings == expected, "the meaning of data.source and data/row_readers.py differ"


def test_the_annealing_of_a_run_is_over_its_schedule() -> None:
    config = resolve(sets=["optim.steps=50", "optim.schedule_steps=100", "model.eps_anneal_start=2.0"])
    assert config.schedule_steps == 100
    assert annealed_eps(config.model, 50, config.schedule_steps) == pytest.approx(config.model.attn_eps)
    assert annealed_eps(config.model, 25, config.schedule_steps) == pytest.approx(1.0)
    assert resolve(sets=["optim.steps=50"]).schedule_steps == 50
    with pytest.raises(ConfigError, match="larger than model"):
        resolve(sets=["model.eps_anneal_start=2.0", "model.eps_anneal_begin=0.5"])


@pytest.mark.parametrize("module", ["cda_cli.config", "cda_cli.errors"])
def test_reading_a_configuration_imports_nothing_heavy(module: str) -> None:
    """A wrong flag is told at once, not after the seconds that torch takes."""
    script = f"import sys; before = set(sys.modules); import {module}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "cda_cli" in loaded
    assert not loaded & {"torch", "numpy", "datasets", "triton", "transformers", "safetensors", "einops"}
