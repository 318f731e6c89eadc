"""The table of settings: a row for each setting of `settings`, with what a person is told of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from cda_cli.settings import SECTIONS, Setting


class Row(NamedTuple):
    """A row of the table.

    `kinds` are the types that the setting may have: int and NoneType are among those of `int | None`. `values` are the
    words that it may be, or that a list of them may hold.
    """

    section: str
    name: str
    kinds: frozenset[Any]
    values: tuple[str, ...]
    default: Any
    setting: Setting

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def meaning(self) -> str:
        return with_values(self.setting.help, self.values)

    @property
    def allowed(self) -> str:
        """What the setting may be, in words."""
        limits = {">": self.setting.gt, "≥": self.setting.ge, "<": self.setting.lt, "≤": self.setting.le}
        bounds = [f"{sign} {as_written(limit)}" for sign, limit in limits.items() if limit is not None]
        if bool in self.kinds:
            words = ["true", "false"]
        elif self.values:
            words = [*self.values, *["several with commas between"] * isinstance(self.default, list)]
        elif isinstance(self.default, list):
            words = ["integers with commas between"]
        elif int in self.kinds or float in self.kinds:
            words = [" ".join(["integer" if int in self.kinds else "number", *bounds[:1]]), *bounds[1:]]
        else:
            words = ["text"]
        return ", ".join([*words, *["or null"] * (NoneType in self.kinds)])


def _values(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is list:
        return _values(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ()


def with_values(help: str, values: Sequence[str]) -> str:
    """`help`, a sentence, with the words that are possible added unless it names each of them already."""
    if set(values) <= set(re.findall(r"[\w-]+", help)):
        return help
    return f"{help.removesuffix('.')}: {', '.join(values[:-1])} or {values[-1]}."


def as_written(value: Any) -> str:
    """A value as `--set` takes it, with commas between the words of a list."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list):
        return ",".join(map(str, value)) or "[]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _rows(section: str) -> Iterator[Row]:
    settings = SECTIONS[section]
    for name, hint in get_type_hints(settings, include_extras=True).items():
        kind, setting = get_args(hint)
        yield Row(section, name, frozenset({kind, *get_args(kind)}), _values(kind), getattr(settings, name), setting)


TABLE = {row.key: row for section in SECTIONS for row in _rows(section)}  # by key, such as "model.attn_k"


# Words of other programs by which one looks for settings that have other names here, with those names.
SYNONYMS = {
    "accumulation": "grad_accum", "adam": "optimizer beta1 beta2", "alibi": "position",
    "asentmax": "attention length_scaling", "auxiliary": "ff_l1 support_target",
    "average": "ema_decay", "block": "depth ff_block_size", "block_size": "seq_len",
    "checkpoint": "save_every save_minutes keep keep_best", "constraint": "support_target support_rate",
    "context": "seq_len", "core": "threads", "corpus": "source", "cpu": "device threads", "d_model": "dim",
    "dataset": "source split", "distributed": "parallel mesh", "early": "patience",
    "embedding": "dim tied_embeddings position", "epoch": "steps", "epsilon": "attn_eps ff_eps",
    "evaluation": "eval_every eval_batches", "expert": "ff ff_block_size", "generate": "sample_every sample_tokens",
    "gpu": "device parallel mesh", "gqa": "kv_heads", "gradient": "clip grad_accum", "hidden": "dim ff_mult ff_width",
    "intermediate_size": "ff_width", "iteration": "steps n_iters", "kernel": "backend",
    "lagrangian": "support_target support_rate", "layer": "depth",
    "learning_rate": "lr min_lr_ratio schedule warmup_steps", "length": "seq_len length_scaling",
    "logging": "log_every track", "max_iters": "steps",
    "memory": "batch_size grad_accum activation_checkpointing", "mixture": "ff ff_block_size",
    "mlp": "ff ff_mult ff_width ff_bias", "momentum": "beta1", "n_ctx": "seq_len", "n_embd": "dim", "n_head": "heads",
    "n_layer": "depth", "penalty": "ff_l1 support_target", "precision": "dtype", "random": "seed",
    "regularization": "weight_decay dropout ff_l1", "rope": "position rotary_base rotary_scaling nope_layers",
    "rope_theta": "rotary_base", "sequence": "seq_len batch_size",
    "sparsity": "attention attn_k ff ff_k learned_k ff_l1 support_target", "speed": "compile dtype cuda_graphs",
    "ssmax": "length_scaling",
    "temperature": "attn_eps ff_eps eps_anneal_start", "text": "source text_column", "top_k": "attn_k ff_k",
    "topk": "attn_k ff_k", "tracker": "track", "validation": "eval_every eval_batches validation_fraction",
    "vocabulary": "tokenizer vocab_size", "width": "dim dim_head ff_mult ff_width", "window": "seq_len",
}  # fmt: skip


def settings_meant(name: str) -> list[str]:
    """The names of the settings for which a name of another program, also in its plural, is a synonym."""
    return SYNONYMS.get(name.removesuffix("s"), "").split()


def find_settings(word: str) -> list[Row]:
    """The settings of a section, or those with a word in their name that begins so; else those whose help holds it.

    Those for which the word is a synonym, also in its plural, are always among them.
    """
    word, name = word.lower(), word.lower().lstrip("-").replace("-", "_")
    if name in SECTIONS:
        return [row for row in TABLE.values() if row.section == name]
    named = [
        row
        for row in TABLE.values()
        if f"_{name}" in f"_{row.name}" or row.key.startswith(name) or name == row.setting.parameter
    ]
    also = settings_meant(name)
    found = named or [row for row in TABLE.values() if word in f"{row.meaning} {row.setting.flag_help}".lower()]
    return [row for row in TABLE.values() if row in found or row.name in also]
