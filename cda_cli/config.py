"""The run's configuration: preset < file < --set < flags. Pydantic refuses unknown keys; no torch in here.

Each section is a frozen model of the settings that `settings` lists, and checks what depends on several of them.
`resolve()` merges the layers and validates once; a checkpoint stores the result.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cda_cli import strict_yaml
from cda_cli.errors import ConfigError, brief, did_you_mean, requirement
from cda_cli.settings import (
    DEFAULT_PRESET,
    PRESET_FOLDER,
    SECTIONS,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    preset_names,
)
from cda_cli.settings_table import TABLE, as_written, settings_meant

# Of an ALiBi head, the channels that hold the position, and the positions that they hold exactly in bf16.
POSITION_CHANNELS, MOST_ALIBI_POSITIONS = 4, 2**16


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: object, info: ValidationInfo) -> object:
        """Reads a number as people write it, and a list with commas. Refuses 1 for true and true for 1."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if get_origin(annotation) is list:
            return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        kinds = {annotation, *get_args(annotation)}
        read = _number(value) if isinstance(value, str) else value
        if bool in kinds and isinstance(read, (int, float)) and not isinstance(read, bool):
            raise ValueError("input should be true or false")
        if not kinds & {int, float}:
            return value
        if isinstance(read, bool):
            raise ValueError("input should be a number")
        return read


def _number(text: str) -> int | float | str:
    """The decimal number that `text` is: 010 is ten, and 1e3 a thousand. `text` itself where it is none."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class ModelConfig(Section, ModelSettings):
    """The settings of the model, which fit together."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.dim_head is None and self.dim % self.heads:
            raise ValueError(
                f"model.dim {self.dim} is not divisible by model.heads {self.heads}; choose a multiple of "
                f"{self.heads}, or set model.dim_head"
            )
        if self.heads % self.key_heads:
            raise ValueError(
                f"model.heads {self.heads} is not divisible by model.kv_heads {self.kv_heads}; choose a divisor of "
                f"{self.heads}, or null"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(
                f"rotary positions turn pairs, and a head is {self.head_width} wide; choose an even model.dim_head"
            )
        if self.position == "nape":
            if self.heads % 2 or self.key_heads % 2 or self.head_width <= POSITION_CHANNELS:
                raise ValueError(
                    f"nape positions take {POSITION_CHANNELS} channels of half of the heads; choose an even "
                    f"model.heads and model.kv_heads, and a model.dim_head above {POSITION_CHANNELS}"
                )
            if self.seq_len > MOST_ALIBI_POSITIONS:
                raise ValueError(f"nape positions end at {MOST_ALIBI_POSITIONS}; choose a model.seq_len up to that")
        if any(not 0 <= layer < self.depth for layer in self.nope_layers):
            raise ValueError(
                f"model.nope_layers {as_written(self.nope_layers)} names a layer that there is not; choose from 0 to "
                f"{self.depth - 1}"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, f"rotary_{low}") >= getattr(self, f"rotary_{high}"):
                raise ValueError(f"model.rotary_{high} must be larger than model.rotary_{low}; change one of them")
        if self.ff_units < 1:
            raise ValueError(f"model.ff_mult {self.ff_mult} leaves the feed-forward no units; make it larger")
        if self.eps_anneal_start is not None and self.eps_anneal_begin >= self.eps_anneal_share:
            raise ValueError(
                f"ε anneals from a share {self.eps_anneal_begin:g} of the schedule to {self.eps_anneal_share:g} of it; "
                "make model.eps_anneal_share larger than model.eps_anneal_begin"
            )
        if self.ff in ("blocks", "hard-topk-blocks", "sigmoid-topk-blocks") and self.ff_units % self.ff_block_size:
            raise ValueError(
                f"the {self.ff_units} units of the feed-forward are not divisible by model.ff_block_size "
                f"{self.ff_block_size}; choose a divisor of {self.ff_units}, or another model.ff_width"
            )
        if self.learned_k and self.attn_k < 1:
            raise ValueError(f"a learned k runs from 1 to attn_k, which is {self.attn_k}; set attn_k to 1 or more")
        return self

    @property
    def head_width(self) -> int:
        return self.dim_head or self.dim // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def scaled_heads(self) -> int:
        """The number of heads, the last ones, on which a length scaling acts."""
        return self.heads // 2 if self.position == "nape" else self.heads

    @property
    def rotary_trained_len(self) -> int:
        """The context length before a scaling of the rotary positions."""
        return self.rotary_original_len or self.seq_len

    @property
    def ff_units(self) -> int:
        return self.ff_width or int(self.dim * self.ff_mult)


class DataConfig(Section, DataSettings):
    """The settings of the data."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str) -> str:
        """Gives an encoding its one name in Python. A codec that encodes no text, such as base64, is refused too."""
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=value)
            return codecs.lookup(value).name
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"there is no encoding {value!r} of text in Python; give one such as utf-8, utf-16, latin-1 or cp1252"
            ) from error


class OptimConfig(Section, OptimSettings):
    """The settings of the optimisation."""


class RunConfig(Section, RunSettings):
    """The settings of the run itself."""

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.mesh is not None and not re.fullmatch(r"(dp=[1-9]\d*,)?cp=[1-9]\d*", self.mesh):
            raise ValueError(f"run.mesh {self.mesh!r} is no mesh; give one such as dp=2,cp=2 or cp=2")
        if self.fork and self.init_from is None:
            raise ValueError("run.fork goes on from the run that run.init_from names, and it names none; set that too")
        return self


class Config(Section):
    """A whole run. `preset` is the one that its settings began from, or None where that is not known."""

    preset: str | None = None
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())
    run: RunConfig = Field(default_factory=lambda: RunConfig())

    @field_validator("preset", mode="before")
    @classmethod
    def _or_none(cls, value: object) -> object:
        """A run may name a preset that this version lacks; its settings stand by themselves."""
        return value if value in preset_names() else None

    @property
    def schedule_steps(self) -> int:
        return self.optim.schedule_steps or self.optim.steps


Layer = Mapping[str, Mapping[str, Any]]


class Resolved(NamedTuple):
    """A configuration, and where each of its values comes from, by key: "default", "preset tiny", "--lr" …"""

    config: Config
    origins: dict[str, str]


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Config | None = None,
    initial: Callable[[str], Config] | None = None,
) -> Config:
    """The configuration of a run: `preset`, then the YAML `file`, then `--set` lines, then flags, the later winning.

    `flags` maps dotted keys ("model.attn_k") to values; None means that the flag was not given. A file may name its
    preset under the key `preset`; the argument wins over it. `base`, the settings of a run that goes on, stands in
    for a preset that is named nowhere. Where `run.init_from` names weights, `initial` returns the settings that these
    were trained with: their model and tokenizer win over the preset. Raises ConfigError.
    """
    return resolve_with_origins(preset, file, sets, flags, base, initial).config


def resolve_with_origins(
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Config | None = None,
    initial: Callable[[str], Config] | None = None,
) -> Resolved:
    """`resolve`, which also says where each value comes from. Raises ConfigError."""
    from_file = read_yaml(file) if file else {}
    in_file = from_file.pop("preset", None)
    named = preset or in_file
    if base and not named and not file:
        start = base.preset
        first: tuple[str, Layer] = ("run", base.model_dump(include=set(SECTIONS)))
    else:
        start = named or DEFAULT_PRESET
        first = (f"preset {start}", read_yaml(preset_file(start)))
    layers = [first, (f"file {file}", from_file)]
    layers += [("--set", read_set(line)) for line in sets]
    layers += [(_flag(key, value), _dotted(key, value)) for key, value in (flags or {}).items() if value is not None]
    for _, layer in layers:
        _check_keys(layer)
    named_weights = [layer["run"]["init_from"] for _, layer in layers[1:] if "init_from" in layer.get("run", {})]
    if initial and named_weights and isinstance(weights := named_weights[-1], str):
        layers.insert(1, (f"weights {weights}", _of_weights(initial(weights))))
    merged: dict[str, dict[str, Any]] = {}
    origins = dict.fromkeys(TABLE, "default")
    for origin, layer in layers:
        for section, values in layer.items():
            merged.setdefault(section, {}).update(values)
            origins |= dict.fromkeys((f"{section}.{name}" for name in values), origin)
    return Resolved(parse({"preset": start, **merged}), origins)


def _of_weights(config: Config) -> Layer:
    """The settings that weights bring along: those of their model, and of their tokenizer."""
    return {"model": config.model.model_dump(), "data": config.data.model_dump(include={"tokenizer", "bos", "eos"})}


def flat(config: Config) -> dict[str, Any]:
    """The values of all settings, by key."""
    return {key: getattr(getattr(config, row.section), row.name) for key, row in TABLE.items()}


def preset_values() -> dict[str, dict[str, Any]]:
    """The values of all settings in each preset: by the preset's name, then by key."""
    return {name: flat(resolve(name)) for name in preset_names()}


def preset_of(config: Config) -> str:
    """The preset that the settings began from, or that from which the fewest differ, as older runs record none."""
    if config.preset:
        return config.preset
    values, presets = flat(config), preset_values()
    return min(presets, key=lambda name: sum(values[key] != value for key, value in presets[name].items()))


def parse(values: Mapping[str, Any]) -> Config:
    """A Config from nested plain values, such as a checkpoint's. Raises ConfigError."""
    _check_keys({section: own for section, own in values.items() if section != "preset"})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def dump_yaml(config: Config) -> str:
    """The configuration as YAML that `--config` reads back."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    # PyYAML writes a NEL as it is, and reads it as a line break.
    return yaml.safe_dump(config.model_dump(), sort_keys=False) if "\x85" in text else text


def annealed_eps(model: ModelConfig, step: int, schedule_steps: int) -> float:
    """ε of the attention at `step`: from eps_anneal_start to attn_eps, evenly in log ε.

    It anneals from eps_anneal_begin to eps_anneal_share, as shares of the schedule.
    """
    if model.eps_anneal_start is None:
        return model.attn_eps
    begin, end = model.eps_anneal_begin * schedule_steps, model.eps_anneal_share * schedule_steps
    progress = min(1.0, max(0.0, step - begin) / max(1.0, end - begin))
    return float(model.eps_anneal_start ** (1 - progress) * model.attn_eps**progress)


def read_yaml(path: Path, remedy: str = "mend it, or give --config another file") -> dict[str, Any]:
    """The sections of a file that `--config` or a run's folder has. Raises ConfigError, which ends with `remedy`."""
    try:
        values = strict_yaml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}; check the path given to --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({brief(error)}); {remedy}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML ({_yaml_fault(error)}); {remedy}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold the sections {', '.join(SECTIONS)}; {remedy}")
    return values


def _yaml_fault(error: Exception) -> str:
    """What is wrong, and in which line, without the snippet of the file that PyYAML adds."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return brief(error)


def preset_file(name: str) -> Path:
    """The YAML file of a preset. Raises ConfigError where there is no such preset."""
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}: {did_you_mean(str(name), preset_names())}")
    return PRESET_FOLDER / f"{name}.yaml"


def preset_purpose(name: str) -> tuple[str, str]:
    """The number of parameters and the purpose of a preset, which the first line of its file gives."""
    first = preset_file(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    parameters, _, purpose = first.partition(" parameters: ")
    return parameters, purpose


def read_set(line: str) -> Layer:
    """The setting of a --set line. Takes text as it is, and any value with a #, at which YAML would cut it off."""
    key, equals, value = line.partition("=")
    if not equals:
        raise ConfigError(f"--set takes section.key=value, not {line!r}")
    key = key.strip()
    _check_keys(layer := _dotted(key, value))
    kinds = TABLE[key].kinds
    if (str in kinds or "#" in value) and not (NoneType in kinds and value.strip() in strict_yaml.NULLS):
        return layer
    try:
        return _dotted(key, strict_yaml.loads(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of --set {line!r} is not valid YAML; put quotes around it") from error


def _flag(key: str, value: Any) -> str:
    """The flag that gave `value` to the setting `key`."""
    on, _, off = TABLE[key].setting.flag.partition("/") if key in TABLE else (key, "", "")
    return off if off and value is False else on or key


def _dotted(key: str, value: Any) -> Layer:
    section, dot, name = key.partition(".")
    if not dot:
        raise ConfigError(f"a setting is named section.key, such as optim.lr, not {key!r}")
    return {section: {name: value}}


def _check_keys(layer: Mapping[str, Any]) -> None:
    for section, values in layer.items():
        if section not in SECTIONS:
            raise ConfigError(f"unknown section {section!r}: {did_you_mean(str(section), SECTIONS)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"section {section!r} holds settings, not {values!r}; write {section}.key=value")
        for name in values:
            if (key := f"{section}.{name}") not in TABLE:
                known = [row.key for row in TABLE.values() if row.section == section]
                meant = [f"{section}.{word}" for word in settings_meant(str(name)) if f"{section}.{word}" in TABLE]
                near = f"did you mean '{meant[0]}'?" if meant else did_you_mean(key, known)
                raise ConfigError(f"unknown setting '{key}': {near}")


def _sentence(error: ValidationError) -> str:
    """The first fault that pydantic found, as one sentence."""
    fault = error.errors()[0]
    message = requirement(fault["msg"])
    if len(fault["loc"]) < 2:  # a fault of a whole section, whose sentence names the settings
        return message
    where = ".".join(str(part) for part in fault["loc"])
    key = ".".join(str(part) for part in fault["loc"][:2])
    return f"{where} = {fault['input']!r} is not possible: {message}; `cda config {key}` says what is"
