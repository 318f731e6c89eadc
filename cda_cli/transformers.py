"""Soft top-k attention for the models of Hugging Face transformers, under the name `attn_implementation="soft_topk"`.

Importing this module registers the name. A model that is loaded with it then runs on the operator (docs/operator.md)
with k = 1 and ε = 1, which is softmax; `use` sets other numbers. They are saved with the model, and a model that has
them runs with no other attention. docs/transformers.md has an example, and says what is refused.

A learned k, one for each query, cannot be had: an attention function of transformers gets queries, keys and values,
never the hidden states that a learned k is computed from.

This needs transformers 5.4 or later, which is the extra `hf`. Earlier ones call mask functions with other arguments,
and do not read `attn_implementation` from config.json.

Shapes: B batch, H query heads, G key heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cda_cli.errors import ConfigError
from cda_cli.ops import Backend, Solver, soft_topk, soft_topk_attention

try:
    from transformers import (
        MODEL_MAPPING,
        AttentionInterface,
        AttentionMaskInterface,
        PreTrainedConfig,
        PreTrainedModel,
        __version__,
    )
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )
except ModuleNotFoundError as error:
    raise ConfigError(
        f"cda_cli.transformers needs the package {error.name}; install it (pip install transformers)"
    ) from error

LEAST_TRANSFORMERS = (5, 4)
if tuple(map(int, __version__.split(".")[:2])) < LEAST_TRANSFORMERS:
    raise ConfigError(
        f"cda_cli.transformers needs transformers 5.4 or later, and this is {__version__}; upgrade it "
        "(pip install --upgrade transformers)"
    )

NAME = "soft_topk"  # of the attention implementation, and of the field of a configuration that has its settings
# The dtype of a mask says whether a query sees earlier keys only, and tells the mask from one that a user made.
CAUSAL, BOTH_WAYS = torch.int32, torch.int16
# Arguments by which models ask for what the operator does not compute.
NOT_COMPUTED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "a soft cap on the scores",
    "position_bias": "a bias on the scores",
    "indices": "a selection of keys by an indexer",
    "block_indices": "a selection of keys by an indexer",
    "output_attentions": "the weights of attention as an output",
}

PerLayer = float | list[float] | tuple[float, ...]  # for all layers, or one for each


class Settings(NamedTuple):
    """The field `soft_topk` of a configuration; `use` says what each means."""

    k: PerLayer = 1.0
    eps: PerLayer = 1.0
    normalise: bool = True
    solver: Solver = "exact"
    n_iters: int = 20
    eps_init: float = 4.0
    eps_decay: float = 0.7
    backend: Backend = "auto"


def use(
    model: nn.Module,
    *,
    k: PerLayer = 1.0,
    eps: PerLayer = 1.0,
    normalise: bool = True,
    solver: Solver = "exact",
    n_iters: int = 20,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
    backend: Backend = "auto",
) -> None:
    """Makes `model`, and every model within it, attend by soft top-k from the next forward on.

    The settings are written to its configuration, so `save_pretrained` saves them, and `from_pretrained` in a process
    that imported this module brings them back. Call it again to change them, for example to anneal k or ε.

    Args:
        model: a model of transformers, or a module that holds one, such as a PEFT model.
        k: the budget of each row, above 0; or a list with one number for each layer.
        eps: the temperature ε > 0, in the units of the scaled scores; or one for each layer. With k = 1 and ε = 1 the
            weights are those of softmax.
        normalise: divide the output by k. The weights of a row sum to k, and a model that was trained with softmax
            expects a sum of 1.
        solver, n_iters, eps_init, eps_decay, backend: as for `cda_cli.ops.soft_topk`.

    Raises:
        ConfigError: a setting without meaning, or a model that computes its attention without transformers' interface.
    """
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not models:
        raise ConfigError(f"use() takes a model of transformers, and {type(model).__name__} holds none")
    configs: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    configs = [config for config in configs if isinstance(config, PreTrainedConfig)]
    settings = Settings(k, eps, normalise, solver, n_iters, eps_init, eps_decay, backend)._asdict()
    for part in models:
        _check_model_class(type(part))
    for config in configs:
        _check_settings(config, settings)
    for part in models:
        part.set_attn_implementation(NAME)
    for config in configs:
        config.soft_topk = settings


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: output [B, T, H, D] for query [B, H, T, D], key and value [B, G, S, D], and no weights.

    `attention_mask` is what `mask` returned. Raises ConfigError for what the operator does not compute.
    """
    for name, what in NOT_COMPUTED.items():
        if others.get(name) is not None and others[name] is not False:
            raise _refusal(f"does not compute {what} ({name}), which this model asks for")
    if dropout:
        raise _refusal(
            f"has no dropout of weights, and this layer asks for {dropout:g} in training; load the model with it at 0 "
            "(attention_dropout=0.0, and for GPT-2 attn_pdrop=0.0)",
            remedy="",
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    documents = None
    if attention_mask is not None:
        if attention_mask.dtype not in (CAUSAL, BOTH_WAYS) or attention_mask.shape[1:3] != (1, 1):
            raise _refusal(
                f"takes no ready mask ({tuple(attention_mask.shape)}, {attention_mask.dtype})",
                "give attention_mask as [batch, keys], 1 where there is a token and 0 where there is padding",
            )
        is_causal, documents = attention_mask.dtype == CAUSAL, attention_mask[:, 0, 0]
        key, value = key[:, :, : documents.shape[1]], value[:, :, : documents.shape[1]]
    elif is_causal and query.shape[2] not in (1, key.shape[2]):
        raise _refusal(f"got {query.shape[2]} queries, {key.shape[2]} keys and no mask, which leaves their order open")
    elif others.get("cu_seq_lens_q") is not None and others["cu_seq_lens_q"].numel() > 2:
        raise _refusal("finds packed texts by their position_ids alone, and not by cu_seq_lens_q", "give both")

    settings = Settings(**getattr(module.config, NAME, {}))
    k, eps = of_layer(settings.k, module), of_layer(settings.eps, module)
    output = soft_topk_attention(
        query,
        key,
        value,
        k,
        eps=eps,
        scale=scaling,
        causal=is_causal,
        documents=documents,
        solver=settings.solver,
        n_iters=settings.n_iters,
        eps_init=settings.eps_init,
        eps_decay=settings.eps_decay,
        backend=settings.backend,
    )
    if settings.normalise:
        output = output / k
    return output.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    config: Any,
    **others: Any,
) -> Tensor | None:
    """The mask function: which document each key belongs to, as whole numbers [B, 1, 1, n], for `attention`.

    Equal numbers in a row are a document (`cda_cli.ops.soft_topk_attention`); padding is a document of its own. The
    keys after n, which a static cache has not filled yet, are to be cut. None stands for a single document whose keys
    are the queries' own or, for a single query, all that there are. The four dimensions tell transformers that the
    mask is ready.

    Raises ConfigError for a mask that documents cannot express, and for a model that would not call `attention`.
    """
    _check_models_of(config.__class__)
    causal = mask_function is not bidirectional_mask_function
    # Nothing after the last query is visible to a causal model. A static cache has a tensor as its offset.
    n = min(kv_length, int(q_offset) + q_length - kv_offset) if causal else kv_length
    tokens = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if tokens is not None:
        tokens = tokens[:, kv_offset : kv_offset + n]
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        documents = None if tokens is None else _documents_of_padding(tokens)
    else:
        visible = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **{**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
        documents = _documents_of_mask(visible[:, 0], n, tokens)
    if documents is None and n == kv_length and (not causal or q_length in (1, n)):
        return None
    if not causal and q_length != n:
        raise _refusal("of queries to another text takes no padding", "give texts of one length")
    if documents is None:
        documents = torch.zeros(1, 1, device=others.get("device"))
    return documents.to(CAUSAL if causal else BOTH_WAYS).expand(batch_size, n)[:, None, None]


def of_layer(numbers: PerLayer, module: Any) -> float:
    """The number of the layer that `module` is of."""
    if not isinstance(numbers, (list, tuple)):
        return numbers
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise _refusal(
            f"takes no list for the layers of {type(module).__name__}, which do not know their places",
            "give one number for all",
        )
    return numbers[layer]


def _documents_of_padding(tokens: Tensor) -> Tensor | None:
    """Documents [B, n] for `tokens` [B, n], which is False at padding, or None if there is no padding."""
    begins = tokens & ~nn.functional.pad(tokens, (1, 0))[:, :-1]
    unpadded, contiguous = torch.stack((tokens.all(), (begins.sum(1) <= 1).all())).tolist()
    if not contiguous:
        raise _refusal("takes no padding between tokens", "pad on the left, with tokenizer.padding_side = 'left'")
    return None if unpadded else tokens


def _documents_of_mask(visible: Tensor, n: int, tokens: Tensor | None) -> Tensor | None:
    """Documents [B, n] that show each query just what `visible` [B, T, S] shows it, or None for a single one.

    The T queries stand at the end of the first n keys. Those that are padding, by `tokens` [B, n], may see what they
    like. This is how packed texts get through, and a window that is never full.
    """
    T, place = visible.shape[1], torch.arange(n, device=visible.device)
    seen = visible[..., :n]
    first = seen.int().argmax(-1)
    real = torch.ones_like(first, dtype=torch.bool) if tokens is None else tokens[:, n - T :]
    earlier = torch.where(place[: n - T] < first[:, :1], -1, first[:, :1])
    first = torch.cat((earlier, first), 1)
    documents = nn.functional.pad((first[:, 1:] != first[:, :-1]).cumsum(1), (1, 0))
    shown = (documents[:, None] == documents[:, n - T :, None]) & (place <= place[n - T :, None])
    expressed = (shown == seen).all(-1) & ~visible[..., n:].any(-1) | ~real
    exact, single = torch.stack((expressed.all(), (documents == 0).all())).tolist()
    if not exact:
        raise _refusal("sees all earlier tokens of a text, and this model masks some of them (such as by a window)")
    return None if single else documents


def _refusal(what: str, remedy: str = "load it with attn_implementation='sdpa' or 'eager' instead") -> ConfigError:
    return ConfigError(f"soft_topk attention {what}{'; ' + remedy if remedy else ''}")


@functools.cache
def _check_models_of(config_class: type) -> None:
    """As `_check_model_class`, for the models that transformers has for a configuration; it may know none."""
    found = MODEL_MAPPING.get(config_class, ())
    for model_class in found if isinstance(found, tuple) else (found,):
        _check_model_class(model_class)


def _check_model_class(model_class: Any) -> None:
    """Refuses a model that never calls an attention function: it would compute softmax, without a mask."""
    if not model_class._can_set_attn_implementation():
        raise _refusal(f"cannot be set: {model_class.__name__} has its own attention, without transformers' interface")


def _check_settings(config: Any, settings: Mapping[str, Any]) -> None:
    """Refuses settings without meaning."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"the field soft_topk of a configuration must hold settings by name, not {settings!r}")
    if unknown := set(settings) - set(Settings._fields):
        raise ConfigError(f"unknown soft_topk settings: {sorted(unknown)}; known: {', '.join(Settings._fields)}")
    k, eps, normalise, solver, n_iters, eps_init, eps_decay, backend = Settings(**settings)
    if not isinstance(normalise, bool):
        raise ConfigError(f"normalise must be True or False, not {normalise!r}")
    if backend not in get_args(Backend):
        raise ConfigError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    layers = getattr(config, "num_hidden_layers", None)
    for name, numbers in (("k", k), ("eps", eps)):
        if isinstance(numbers, (list, tuple)) and len(numbers) != layers:
            raise ConfigError(f"{name} must be a number, or one for each of {layers} layers, not {len(numbers)}")
        if math.inf in (numbers if isinstance(numbers, (list, tuple)) else (numbers,)):
            raise ConfigError(f"{name} must be finite")
    row = torch.zeros(1, 1)
    try:
        for number in k if isinstance(k, (list, tuple)) else (k,):
            soft_topk(row, number, solver=solver, n_iters=n_iters, eps_init=eps_init, eps_decay=eps_decay)
        for number in eps if isinstance(eps, (list, tuple)) else (eps,):
            soft_topk(row, 1.0, eps=number)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _check_implementation(settings: Mapping[str, Any], implementation: str | None) -> None:
    if implementation not in (None, NAME):
        raise ConfigError(
            f"this model has soft_topk settings (k = {settings.get('k')}, eps = {settings.get('eps')}), which "
            f"attn_implementation='{implementation}' would ignore; delete them (del config.soft_topk) to run it so"
        )


# transformers does not save the attention implementation, and changes it without a word: for continuous batching, or
# where `attn_implementation` is given. The two properties below keep a configuration with settings to "soft_topk".


def _settings(config: Any) -> Mapping[str, Any]:
    if NAME not in vars(config):
        raise AttributeError(f"{type(config).__name__} has no soft_topk settings")
    return vars(config)[NAME]


def _set_settings(config: Any, settings: Mapping[str, Any]) -> None:
    """Also adds what makes `from_pretrained` choose the implementation, or fail without this module."""
    _check_settings(config, settings)
    _check_implementation(settings, getattr(config, "_attn_implementation", None))
    vars(config).update({NAME: dict(settings), "attn_implementation": NAME, "_attn_implementation_internal": NAME})


def _delete_settings(config: Any) -> None:
    del vars(config)[NAME]
    vars(config).pop("attn_implementation", None)


def _implementation(config: Any) -> str | None:
    return vars(config).get("_attn_implementation_internal")


def _set_implementation(config: Any, implementation: str | None) -> None:
    if settings := vars(config).get(NAME):
        _check_implementation(settings, implementation)
        implementation = NAME  # a configuration that holds this one passes None on
    vars(config)["_attn_implementation_internal"] = implementation


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, torch.compiler.disable(mask))  # It reads the numbers of masks.
PreTrainedConfig.soft_topk = property(_settings, _set_settings, _delete_settings)
PreTrainedConfig._attn_implementation_internal = property(_implementation, _set_implementation)
