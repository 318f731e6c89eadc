"""The families of models that other tools know, by the `model_type` of transformers.

A family says how its config.json becomes settings of `model`, and which of its tensors make each of ours. Both are
tables that are read in both directions: `model_settings` and `family_config` here, `to_ours` and `to_theirs` in
`conversion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cda_cli.config import ModelConfig
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.interchange.conversion import HEAD, Rows
from cda_cli.interchange.rotary import rotary_config, rotary_settings
from cda_cli.model.layers import LAYERNORM_EPS, RMSNORM_EPS


class Choice(NamedTuple):
    """The values that a key of config.json may have, with the values of a setting that they stand for."""

    key: str
    values: Mapping[Any, Any]


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    `keys` maps settings to the keys of config.json with the same value, and `choices` to those with another. `fixed`
    are the settings that all models of the family share. `defaults` are the values of keys that a config.json may leave
    out. `required` are the values of the keys that would otherwise change what is computed. `prefix` begins the name of
    each tensor below the head; a file of the model without its head leaves it out. `derived` matches the names of
    tensors that follow from the configuration.
    """

    architecture: str
    prefix: str
    keys: Mapping[str, str]
    choices: Mapping[str, Choice]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    tensors: Mapping[str, Rows]
    derived: str
    required: Mapping[str, Any] = field(default_factory=dict)


# What every family has, whatever it is.
PLAIN = {
    "attention": "softmax", "null_kv": 0, "output_gate": False, "nope_layers": [], "length_scaling": "none",
    "dropout": 0.0,
}  # fmt: skip

LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "dim_head": "head_dim",
    "ff_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA_FIXED = {
    "position": "rotary",
    "norm": "rmsnorm",
    "qk_norm": False,
    "attn_bias": "none",
    "ff_bias": False,
    "logits_bias": False,
}
SWIGLU = {"ff": Choice("hidden_act", {"silu": "swiglu", "swish": "swiglu"})}
BIAS_OR_NONE = {"attn_bias": Choice("attention_bias", {False: "none", True: "all"})}
LAYER = "model.layers.{}."
LLAMA_TENSORS = {
    "token_embedding.weight": Rows(("model.embed_tokens.weight",)),
    "norm.weight": Rows(("model.norm.weight",)),
    "to_logits.weight": Rows((HEAD,)),
    "blocks.{}.attention_norm.weight": Rows((LAYER + "input_layernorm.weight",)),
    "blocks.{}.feed_forward_norm.weight": Rows((LAYER + "post_attention_layernorm.weight",)),
    "blocks.{}.attention.query_norm.weight": Rows((LAYER + "self_attn.q_norm.weight",)),
    "blocks.{}.attention.key_norm.weight": Rows((LAYER + "self_attn.k_norm.weight",)),
} | {
    f"blocks.{{}}.{ours}.{part}": Rows(tuple(f"{LAYER}{name}_proj.{part}" for name in theirs))
    for part in ("weight", "bias")
    for ours, theirs in {
        "attention.to_qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
        "attention.to_out": ("self_attn.o",),
        "feed_forward.proj_in": ("mlp.up",),
        "feed_forward.proj_gate": ("mlp.gate",),
        "feed_forward.proj_out": ("mlp.down",),
    }.items()
}
GPT2_TENSORS = {
    "token_embedding.weight": Rows(("transformer.wte.weight",)),
    "position_embedding.weight": Rows(("transformer.wpe.weight",)),
    "to_logits.weight": Rows((HEAD,)),
} | {
    f"{ours}.{part}": Rows((f"transformer.{theirs}.{part}",), transposed=part == "weight" and "c_" in theirs)
    for part in ("weight", "bias")
    for ours, theirs in {
        "norm": "ln_f",
        "blocks.{}.attention_norm": "h.{}.ln_1",
        "blocks.{}.feed_forward_norm": "h.{}.ln_2",
        "blocks.{}.attention.to_qkv": "h.{}.attn.c_attn",
        "blocks.{}.attention.to_out": "h.{}.attn.c_proj",
        "blocks.{}.feed_forward.proj_in": "h.{}.mlp.c_fc",
        "blocks.{}.feed_forward.proj_out": "h.{}.mlp.c_proj",
    }.items()
}


def _llama(
    architecture: str, choices: Mapping[str, Choice], fixed: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Family:
    """Llama, and the families that differ from it in a few settings."""
    return Family(
        architecture=architecture,
        prefix="model.",
        keys=LLAMA_KEYS,
        choices={**SWIGLU, **choices},
        fixed={name: value for name, value in {**LLAMA_FIXED, **fixed}.items() if name not in choices},
        defaults={**LLAMA_DEFAULTS, **defaults},
        tensors=LLAMA_TENSORS,
        derived=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        keys={
            "vocab_size": "vocab_size",
            "seq_len": "n_positions",
            "dim": "n_embd",
            "depth": "n_layer",
            "heads": "n_head",
            "ff_width": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "tied_embeddings": "tie_word_embeddings",
        },
        choices={
            "ff": Choice(
                "activation_function",
                {"gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu"},
            )
        },
        fixed={
            "kv_heads": None,
            "dim_head": None,
            "position": "learned",
            "norm": "layernorm",
            "qk_norm": False,
            "attn_bias": "all",
            "ff_bias": True,
            "logits_bias": False,
        },
        defaults={
            "n_positions": 1024,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        tensors=GPT2_TENSORS,
        derived=r"transformer\.h\.\d+\.attn\.(masked_)?bias",  # the causal mask
    ),
    "llama": _llama(
        "LlamaForCausalLM", BIAS_OR_NONE | {"ff_bias": Choice("mlp_bias", {False: False, True: True})}, {}, {}
    ),
    "qwen2": _llama("Qwen2ForCausalLM", {}, {"attn_bias": "qkv"}, {"use_sliding_window": False}),
    "qwen3": _llama(
        "Qwen3ForCausalLM", BIAS_OR_NONE, {"qk_norm": True}, {"use_sliding_window": False, "head_dim": 128}
    ),
    "mistral": _llama("MistralForCausalLM", {}, {}, {"sliding_window": 4096, "num_key_value_heads": 8}),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises CheckpointError where it is none of FAMILIES."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"the architecture {kind!r} is not among those that cda can import; give a model of {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def model_settings(config: Mapping[str, Any], seq_len: int | None = None) -> dict[str, Any]:
    """The settings of `model` that a config.json stands for, with a context of `seq_len` instead of its own.

    Raises CheckpointError where the model computes something that the settings cannot say, and ConfigError for a
    context that it does not have.
    """
    family = family_of(config)
    try:
        return _settings(family, {**family.defaults, **config}, seq_len)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"the config.json of the model is damaged ({error}); download it again") from error


def _settings(family: Family, config: Mapping[str, Any], seq_len: int | None) -> dict[str, Any]:
    lacking = [key for key in family.keys.values() if key not in config and key not in _OPTIONAL]
    if lacking:
        raise CheckpointError(f"the config.json of the model does not say its {lacking[0]}; download it again")
    settings = {**PLAIN, **family.fixed, **{name: config.get(key) for name, key in family.keys.items()}}
    for name, (key, values) in family.choices.items():
        if config[key] not in values:
            known = ", ".join(map(str, values))
            raise CheckpointError(f"cda has no {key} {config[key]!r}, which the model needs; give one with {known}")
        settings[name] = values[config[key]]
    for key, value in family.required.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"cda has no {key} {config[key]!r}, which the model needs; give one with {value!r}")
    if config.get("quantization_config"):
        raise CheckpointError(
            "the model is quantised by a method that cda does not read; give its original weights, or a GGUF file"
        )
    if settings["ff_width"] is None:
        settings["ff_width"] = 4 * settings["dim"]
    if settings["position"] == "rotary":
        settings |= rotary_settings(config)
    settings["seq_len"] = _context(config, settings, seq_len)
    return settings | _soft_top_k(config.get("soft_topk"))


# The numbers of the field `soft_topk`, which `cda_cli.transformers.use` leaves in config.json, and our settings.
_OF_SOFT_TOP_K = {
    "k": "attn_k",
    "eps": "attn_eps",
    "solver": "solver",
    "n_iters": "n_iters",
    "eps_init": "eps_init",
    "eps_decay": "eps_decay",
}


def _soft_top_k(used: Mapping[str, Any] | None) -> dict[str, Any]:
    """The attention rule of a model that runs on the operator within transformers; nothing for any other model."""
    if used is None:
        return {}
    rule: dict[str, Any] = {"attention": "coordinate-descent", "normalise": "k" if used["normalise"] else "none"}
    for theirs, ours in _OF_SOFT_TOP_K.items():
        rule[ours] = used[theirs]
        if isinstance(used[theirs], list):
            raise CheckpointError(
                f"the model has a {theirs} for each layer, where cda has one for all; give one to "
                "cda_cli.transformers.use, and save the model again"
            )
    return rule


# Keys that may be missing or null: the head width follows from the width, and so on.
_OPTIONAL = {"num_key_value_heads", "head_dim", "n_inner"}


def wanted_context(longest: int, seq_len: int | None) -> int:
    """The context of a model that reads at most `longest` tokens. Raises ConfigError where `seq_len` is more."""
    if seq_len is not None and seq_len > longest:
        raise ConfigError(f"the model reads at most {longest:,} tokens; give --seq-len {longest} or fewer")
    return seq_len or longest


def _context(config: Mapping[str, Any], settings: Mapping[str, Any], seq_len: int | None) -> int:
    wanted = wanted_context(int(settings["seq_len"]), seq_len)
    window = _window(config, settings["depth"])
    if window is not None and window < wanted:
        raise ConfigError(
            f"the model attends within a window of {window:,} tokens and its context has {wanted:,}; give --seq-len "
            f"{window}, in which it is exact"
        )
    return wanted


def _window(config: Mapping[str, Any], depth: int) -> int | None:
    """The number of keys that a query of some layer sees at most; None where each sees all before it."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return None
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    if kinds is None and config.get("max_window_layers", 0) >= depth:
        return None
    return int(window)


def family_config(name: str, model: ModelConfig) -> dict[str, Any]:
    """The config.json of the family `name` that stands for `model`, as far as the family can say it."""
    family = FAMILIES[name]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": name, "dtype": "float32"}
    explicit = _explicit(model)
    for setting, key in family.keys.items():
        config[key] = getattr(explicit, setting)
    for setting, (key, values) in family.choices.items():
        config[key] = next((theirs for theirs, ours in values.items() if ours == getattr(model, setting)), None)
    if family.fixed["position"] == "rotary":
        config |= rotary_config(model)
    if "sliding_window" in family.defaults:
        config["sliding_window"] = None
    return config | dict(family.required)


def plain_family(model: ModelConfig) -> str | None:
    """The family of which `model` is one, exactly; None where its configuration says more than any family can."""
    for name in FAMILIES:
        config = family_config(name, model)
        if None in [config[choice.key] for choice in FAMILIES[name].choices.values()]:
            continue
        of_training = {"dropout": model.dropout}  # which evaluation and generation leave out
        settings = model_settings(config) | of_training
        if _explicit(ModelConfig.model_validate(model.model_dump() | settings)) == _explicit(model):
            return name
    return None


def _explicit(model: ModelConfig) -> ModelConfig:
    """Returns the same model, with an explicit value for each number that it would derive or have by default."""
    default_eps = LAYERNORM_EPS if model.norm == "layernorm" else RMSNORM_EPS
    numbers = {
        "kv_heads": model.key_heads,
        "dim_head": model.head_width,
        "ff_width": model.ff_units,
        "norm_eps": model.norm_eps or default_eps,
        "logits_bias": model.logits_bias and not model.tied_embeddings,
        "rotary_original_len": model.rotary_trained_len,
    }
    return model.model_copy(update=numbers)
