"""The run's configuration: preset < file < --set < flags. Pydantic refuses unknown keys; no torch in here.

Four sections, each a frozen model whose fields say what they mean where they are declared: `model`, `data`, `optim`,
`run`. `resolve()` merges the layers and validates once; the result is what a checkpoint stores.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cda_cli import strict_yaml
from cda_cli.errors import ConfigError, did_you_mean

PRESET_FOLDER = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"
MOST_THREADS = 4096
CONFIG_FILE = "config.yaml"  # in the folder of a run


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def kinds(cls, name: str) -> set[Any]:
        """The types that a setting may have: {int, NoneType} of `int | None`."""
        annotation = cls.model_fields[name].annotation
        return set(get_args(annotation)) or {annotation}

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: object, info: ValidationInfo) -> object:
        """Numbers as people write them; and no 1 for true, nor true for 1, as pydantic would have it."""
        assert info.field_name is not None
        kinds, read = cls.kinds(info.field_name), _number(value) if isinstance(value, str) else value
        if bool in kinds and isinstance(read, (int, float)) and not isinstance(read, bool):
            raise ValueError("input should be true or false")
        if not kinds & {int, float}:
            return value
        if isinstance(read, bool):
            raise ValueError("input should be a number")
        return read


def _number(text: str) -> int | float | str:
    """010 is ten, 1e3 a thousand; `text` itself where it is no decimal number."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class ModelConfig(Section):
    """The decoder-only Transformer."""

    vocab_size: int = Field(256, ge=2, description="Tokens; set from the tokenizer.")
    seq_len: int = Field(256, ge=2, description="Context length, tokens.")
    dim: int = Field(128, ge=1, description="Width of the residual stream.")
    depth: int = Field(4, ge=1, description="Number of blocks.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    dim_head: int | None = Field(None, ge=1, description="Width of a head; dim / heads where not given.")
    ff_mult: float = Field(4.0, gt=0, description="Width of the feed-forward, times dim.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the embeddings and on each residual branch.")
    position: Literal["learned", "rotary"] = Field("learned", description="Position embedding.")
    rotary_base: float = Field(10000.0, gt=1, description="Wavelength base of the rotary positions.")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation before each branch.")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys, with a learned gain per head dimension.")
    tied_embeddings: bool = Field(False, description="Logits from the transposed token embedding.")
    null_kv: int = Field(0, ge=0, description="Learned key/value pairs that every query sees, per head.")

    attention: Literal["softmax", "coordinate-descent"] = Field("coordinate-descent", description="Attention weights.")
    attn_k: float = Field(2.0, gt=0, description="Budget k of an attention row: it may attend fully to k keys.")
    attn_eps: float = Field(0.1, gt=0, description="Temperature ε of the attention weights.")
    learned_k: bool = Field(False, description="k per query and head: 1 + (attn_k − 1)·sigmoid(linear(normed input)).")
    learned_k_bias: float = Field(-10.0, description="Initial bias of that linear; −10 starts at k ≈ 1.")
    output_gate: bool = Field(
        False, description="Scale each head's output by a gate of the learned k's form: the control for learned_k."
    )
    eps_anneal_start: float | None = Field(None, gt=0, description="ε of the attention at step 0; null: no annealing.")
    eps_anneal_share: float = Field(0.5, gt=0, le=1, description="Share of the schedule after which ε is attn_eps.")

    ff: Literal["gelu", "coordinate-descent"] = Field("gelu", description="Feed-forward activation.")
    ff_k: float = Field(128.0, gt=0, description="Budget k of a feed-forward row.")
    ff_eps: float = Field(0.1, gt=0, description="Temperature ε of the feed-forward.")

    solver: Literal["exact", "iterative"] = Field("exact", description="How the soft top-k is solved.")
    n_iters: int = Field(20, ge=1, description="Iterations of the iterative solver.")
    eps_init: float = Field(4.0, gt=0, description="First ε of the iterative solver.")
    eps_decay: float = Field(0.7, gt=0, le=1, description="Factor on ε for each iteration.")

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.dim_head is None and self.dim % self.heads:
            raise ValueError(
                f"model.dim {self.dim} is not divisible by model.heads {self.heads}; choose a multiple of "
                f"{self.heads}, or set model.dim_head"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(
                f"rotary positions turn pairs, and a head is {self.head_width} wide; choose an even model.dim_head"
            )
        if self.ff_width < 1:
            raise ValueError(f"model.ff_mult {self.ff_mult} leaves the feed-forward no units; make it larger")
        if self.learned_k and self.attn_k < 1:
            raise ValueError(f"a learned k runs from 1 to attn_k, which is {self.attn_k}; set attn_k to 1 or more")
        return self

    @property
    def head_width(self) -> int:
        return self.dim_head or self.dim // self.heads

    @property
    def ff_width(self) -> int:
        return int(self.dim * self.ff_mult)


class DataConfig(Section):
    """Text and tokens."""

    source: str = Field("stdlib", description="stdlib, a path or glob, or hf:OWNER/NAME[:CONFIG].")
    split: str = Field("train", description="Split of a Hugging Face dataset that is trained on.")
    text_column: str = Field("text", description="Column that holds the text.")
    encoding: str = Field("utf-8", description="Encoding of local text, JSON and CSV files, by Python's name for it.")
    streaming: bool = Field(False, description="Tokenise as it trains; prepare and cache nothing.")
    tokenizer: str = Field("bytes", description="bytes, a tokenizer.json, or a hub id.")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the text held out for validation.")

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str) -> str:
        """By one name whatever it was called. A codec that is not of text, such as base64, raises LookupError too."""
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=value)
            return codecs.lookup(value).name
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"there is no encoding {value!r} of text in Python; give one such as utf-8, utf-16, latin-1 or cp1252"
            ) from error


class OptimConfig(Section):
    """Optimisation. Tokens per step = batch_size × grad_accum × seq_len."""

    steps: int = Field(1000, ge=1, description="Optimizer steps; may be raised when a run is resumed.")
    schedule_steps: int | None = Field(None, ge=1, description="Length of the learning-rate schedule; null: steps.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    batch_size: int = Field(16, ge=1, description="Sequences in one forward pass.")
    grad_accum: int = Field(1, ge=1, description="Forward passes for one step.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw; or muon for the matrices within blocks, and AdamW for the rest."
    )
    lr: float = Field(1e-3, gt=0, le=1e3, description="Peak learning rate, of Muon and AdamW alike.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate, as a share of lr.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.1, ge=0, description="On matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean squared gradient.")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0: no clipping.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Decay of a moving average of the weights, such as 0.999; 0: none."
    )
    max_refused: int = Field(5, ge=1, description="Batches in a row without a finite loss and gradient that end a run.")


class RunConfig(Section):
    """The run itself: none of this changes what the model is."""

    seed: int = Field(0, ge=0, lt=2**63, description="Of the weights, the order of the data, dropout and samples.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Of the matrix products.")
    threads: int | None = Field(
        None, ge=1, le=MOST_THREADS, description="CPU threads of a process; null: as many as the run began with."
    )
    compile: bool | None = Field(None, description="torch.compile; null: on a GPU only.")
    cuda_graphs: bool | None = Field(
        None, description="Launch forward and backward of a batch whole, as a CUDA graph; null: where that is possible."
    )
    deterministic: bool = Field(
        False, description="PyTorch's deterministic algorithms: the same bits each time on one kind of GPU."
    )
    activation_checkpointing: bool = Field(
        False, description="Keep only each block's input for the backward and compute the rest again."
    )
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="Of several processes: whole copies, or shards.")
    backend: Literal["auto", "torch", "triton", "colt5"] = Field("auto", description="Backend of the operator.")
    log_every: int = Field(10, ge=1, description="Steps between two lines of figures.")
    eval_every: int = Field(250, ge=0, description="Steps between two validations; 0: only at the end.")
    eval_batches: int = Field(20, ge=1, description="Batches of a validation during training.")
    save_every: int = Field(250, ge=0, description="Steps between two checkpoints; 0: only at the end.")
    save_minutes: float = Field(0.0, ge=0, description="Minutes between two checkpoints, besides save_every; 0: none.")
    track: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Trackers besides metrics.jsonl: tensorboard, wandb, trackio."
    )
    sample_every: int = Field(0, ge=0, description="Steps between two samples of text; 0: none.")
    keep: int = Field(2, ge=2, description="Newest checkpoints kept.")
    keep_best: bool = Field(
        True, description="Also keep the best by validation loss, of those saved at a step that was validated."
    )
    patience: int = Field(
        0, ge=0, description="Validations in a row without a new lowest loss that end the run; 0: it has all its steps."
    )

    @field_validator("track", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())
    run: RunConfig = Field(default_factory=lambda: RunConfig())

    @property
    def schedule_steps(self) -> int:
        return self.optim.schedule_steps or self.optim.steps


Layer = Mapping[str, Mapping[str, Any]]


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """The configuration of a run: `preset`, then the YAML `file`, then `--set` lines, then flags, the later winning.

    `flags` maps dotted keys ("model.attn_k") to values; None means that the flag was not given. A file may name its
    preset under the key `preset`; the argument wins over it. `base`, the settings of a run that goes on, stands in
    for a preset that is named nowhere. Raises ConfigError.
    """
    from_file = _read_yaml(file) if file else {}
    in_file = from_file.pop("preset", None)
    named = preset or in_file
    start = base.model_dump() if base and not named and not file else _preset_layer(named or DEFAULT_PRESET)
    layers: list[Layer] = [start, from_file]
    layers += [_read_set(line) for line in sets]
    layers += [_dotted(key, value) for key, value in (flags or {}).items() if value is not None]
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        _check_keys(layer)
        for section, values in layer.items():
            merged.setdefault(section, {}).update(values)
    return parse(merged)


def parse(values: Mapping[str, Any]) -> Config:
    """A Config from nested plain values, such as a checkpoint's. Raises ConfigError."""
    _check_keys(values)
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
    """ε of the attention at `step`: from eps_anneal_start to attn_eps, evenly in log ε, over eps_anneal_share."""
    if model.eps_anneal_start is None:
        return model.attn_eps
    progress = min(1.0, step / max(1.0, model.eps_anneal_share * schedule_steps))
    return float(model.eps_anneal_start ** (1 - progress) * model.attn_eps**progress)


def settings_of(run: Path, resume: str) -> Config | None:
    """The settings that a run goes on with where no preset or file is named, from the configuration in its folder.

    `resume` is "auto", "never", or the path of a run or of one of its checkpoints. None where there is no such run.
    """
    if resume == "never":
        return None
    named = Path(resume).resolve()
    for folder in [run] if resume == "auto" else [named, named.parent, named.parent.parent]:
        if os.path.lexists(folder / CONFIG_FILE):
            return parse(_read_yaml(_no_link(folder / CONFIG_FILE)))
        if os.path.lexists(folder / "state.json"):  # a checkpoint, wherever it was copied to
            return parse(_read_yaml(_no_link(folder / "state.json")).get("config", {}))
    return None


def _no_link(path: Path) -> Path:
    """A run is read that may come from anywhere; a file of it that is a link would lead to another one."""
    if path.is_symlink() or not path.is_file():
        raise ConfigError(f"{path} is a link, or no file; put a file in its place")
    return path


def _preset_layer(name: str) -> Layer:
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}: {did_you_mean(str(name), preset_names())}")
    return _read_yaml(PRESET_FOLDER / f"{name}.yaml")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = strict_yaml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}; check the path given to --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give --config a YAML text file") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML ({' '.join(str(error).split())}); mend it there") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the sections {', '.join(Config.model_fields)}, each with its settings")
    return values


def _read_set(line: str) -> Layer:
    """`section.key=value` of --set. Text is taken as it is, and so is any value with a #, which YAML would cut off."""
    key, equals, value = line.partition("=")
    if not equals:
        raise ConfigError(f"--set takes section.key=value, not {line!r}")
    key = key.strip()
    _check_keys(layer := _dotted(key, value))
    section, _, name = key.partition(".")
    kinds = Config.model_fields[section].annotation.kinds(name)  # type: ignore[union-attr]
    if (str in kinds or "#" in value) and not (NoneType in kinds and value.strip() in strict_yaml.NULLS):
        return layer
    try:
        return _dotted(key, strict_yaml.loads(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of --set {line!r} is not valid YAML; put quotes around it") from error


def _dotted(key: str, value: Any) -> Layer:
    section, dot, name = key.partition(".")
    if not dot:
        raise ConfigError(f"a setting is named section.key, such as optim.lr, not {key!r}")
    return {section: {name: value}}


def _check_keys(layer: Mapping[str, Any]) -> None:
    sections = Config.model_fields
    for section, values in layer.items():
        if section not in sections:
            raise ConfigError(f"unknown section {section!r}: {did_you_mean(str(section), sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"section {section!r} holds settings, not {values!r}; write {section}.key=value")
        known = sections[section].annotation.model_fields  # type: ignore[union-attr]
        for name in values:
            if name not in known:
                near = did_you_mean(f"{section}.{name}", [f"{section}.{key}" for key in known])
                raise ConfigError(f"unknown setting '{section}.{name}': {near}")


def _sentence(error: ValidationError) -> str:
    """The first fault that pydantic found, as one sentence."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    if len(fault["loc"]) < 2:  # of a whole section, whose words name the settings
        return message
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where} = {fault['input']!r} is not possible: {message[0].lower()}{message[1:]}"
