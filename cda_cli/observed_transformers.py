"""Observes what each layer of a model of transformers selects, as `cda_cli.model.observe` does for ours.

Within `observing` the layers of a model call an attention function that computes dense weights in blocks of rows:
softmax, or the soft top-k where the model has it (`cda_cli.transformers`). The model runs on single windows without
padding and without a cache.

Shapes: B batch, H query heads, G key heads, T queries and keys, t queries of a block, D head width, C width of the
residual stream, F units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# cda_cli.transformers has said in one sentence if transformers is not there.
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from cda_cli.errors import ConfigError
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, Observer
from cda_cli.model.rules.base import BLOCK_SCORES
from cda_cli.ops import for_each_query, soft_topk
from cda_cli.transformers import NAME, NOT_COMPUTED, Settings, attention, of_layer

IMPLEMENTATION = "cda_observed"  # of the attention of models that have another one than soft top-k
COMPUTED = ("softcap", "output_attentions")  # those of NOT_COMPUTED that dense weights allow

_observers: dict[nn.Module, Observer] = {}  # of each module of the models that are observed


class Description(NamedTuple):
    """What a model says of itself.

    `context` is None where it takes any number of tokens, and `eps` where layers differ in it, or it has none.
    `has_budget` says whether it has soft top-k, with a budget k, and not softmax.
    """

    name: str
    layers: int
    context: int | None
    largest_k: float
    eps: float | None
    has_budget: bool


def describe(model: Any) -> Description:
    """Reads the configuration of a model of transformers. Raises ConfigError as `observing` does."""
    _check(model)
    config, settings = model.config.get_text_config(), _settings(model.config)
    k, eps = (settings.k, settings.eps) if settings else (1.0, None)
    return Description(
        getattr(model.config, "_name_or_path", "") or type(model).__name__,
        config.num_hidden_layers,
        getattr(config, "max_position_embeddings", None),
        max(k) if isinstance(k, (list, tuple)) else k,
        None if isinstance(eps, (list, tuple)) else eps,
        settings is not None,
    )


@contextmanager
def observing(
    model: Any, observer: Observer, see_residual: Callable[[int, Tensor], None] = lambda layer, x: None
) -> Iterator[None]:
    """Within it, each layer of `model` calls `observer` for its rows and for its feed-forward.

    A forward pass takes one window, without padding and without a cache. `see_residual` gets the output [B, T, C] of
    each layer. A feed-forward is seen where one matrix of the layer leads from its units back to the residual stream,
    so not one of experts. What heads write is not known, so `to_out` is None. Raises ConfigError for a model whose
    attention cannot be seen; so does a forward pass.
    """
    _check(model)
    width = model.config.get_text_config().hidden_size
    with ExitStack() as undo:
        undo.enter_context(_attending(model, observer))
        for layer, block in _layers(model).items():
            undo.callback(block.register_forward_hook(_residual_hook(layer, see_residual)).remove)
            matrix = _from_units(block, width)
            if matrix is not None:
                undo.callback(matrix.register_forward_pre_hook(_units_hook(layer, observer)).remove)
        yield


def _check(model: Any) -> None:
    """Refuses what is no model of transformers, and one that never calls an attention function."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{name} cannot be inspected; give a run, an exported folder or a model of transformers")
    if not model._can_set_attn_implementation():
        raise _unseen(name, "has an attention of its own, without transformers' interface")


@contextmanager
def _attending(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within it, all attention of `model` is `_attend`, whatever implementation it has."""
    modules = list(model.modules())
    configs = {id(config): config for part in modules if isinstance(config := _config(part), PreTrainedConfig)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    AttentionInterface.register(NAME, _attend)
    try:
        _observers.update(dict.fromkeys(modules, observer))
        for config, implementation in before:
            if implementation != NAME:
                config._attn_implementation_internal = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module in modules:
            _observers.pop(module, None)
        if not _observers:
            AttentionInterface.register(NAME, attention)


def _settings(config: Any) -> Settings | None:
    """The settings of soft top-k, or None for a model with softmax."""
    return Settings(**getattr(config, NAME)) if hasattr(config, NAME) else None


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _residual_hook(layer: int, see_residual: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        see_residual(layer, (output if isinstance(output, Tensor) else output[0]).detach())

    return hook


def _units_hook(layer: int, observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        matrix = _matrix(module)
        assert matrix is not None
        # Some models put the positions of all texts into one dimension; here there is a single text.
        activations = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).unsqueeze(0)
        observer(ObservedFeedForward(layer, activations, matrix.detach()))

    return hook


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any) -> Any:
    """The attention function. Modules of models that are not observed go on as before."""
    if module not in _observers:
        return attention(module, query, key, value, mask, **others)
    return _attention(_observers[module], module, query, key, value, mask, **others)


def _attention(
    observer: Observer,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: output [B, T, H, D] for query [B, H, T, D], key and value [B, G, T, D]."""
    name, layer = type(module).__name__, getattr(module, "layer_idx", None)
    for argument, what in NOT_COMPUTED.items():
        if argument not in COMPUTED and others.get(argument) is not None and others[argument] is not False:
            raise _unseen(name, f"has {what} ({argument})")
    if layer is None:
        raise _unseen(name, "does not know its place among the layers")
    B, H, T, D = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if key.shape[2] != T or not (causal or mask is not None):
        raise _unseen(name, "has queries that see later keys, or keys of another text")
    if mask is not None and mask.dtype != torch.bool:
        raise _unseen(name, "makes a mask of its own")
    settings = _settings(module.config)
    key, value = for_each_query(key, H), for_each_query(value, H)
    scale = D**-0.5 if scaling is None else scaling
    outputs = []
    rows = max(1, BLOCK_SCORES // (B * H * T))
    for first in range(0, T, rows):
        scores = scale * query[:, :, first : first + rows].float() @ key.float().transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        t = scores.shape[2]
        visible = torch.ones(t, T, dtype=torch.bool, device=scores.device).tril(first)
        seen = None
        if mask is not None:  # that of a window, or of a model that looks both ways
            seen = mask[0, 0, first : first + t, :T]
            if (seen & ~visible).any():
                raise _unseen(name, "has queries that see later keys")
            visible = seen
        k = 1.0
        if settings is None:
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        else:
            k = of_layer(settings.k, module)
            weights = soft_topk(
                scores,
                k,
                mask=visible,
                eps=of_layer(settings.eps, module),
                solver=settings.solver,
                n_iters=settings.n_iters,
                eps_init=settings.eps_init,
                eps_decay=settings.eps_decay,
                backend=settings.backend,
            )
        factor = 1 / k if settings is not None and settings.normalise else 1.0
        budget, output_scale = (weights.new_full((B, H, t), number) for number in (k, factor))
        observer(ObservedAttention(layer, weights, budget, 0, first, value, None, output_scale, visible=seen))
        outputs.append(factor * weights.to(value.dtype) @ value)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _layers(model: nn.Module) -> dict[int, nn.Module]:
    """The layers by their place, which a module within each of them knows."""
    found: dict[int, nn.Module] = {}
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            places = {place for part in block.modules() if isinstance(place := getattr(part, "layer_idx", None), int)}
            if len(places) == 1:
                found.setdefault(places.pop(), block)
    return found


def _from_units(block: nn.Module, width: int) -> nn.Module | None:
    """The matrix of a layer that leads from another width to `width`, outside attention, if there is one alone."""
    if any(parameter.ndim > 2 for parameter in block.parameters()):
        return None  # experts
    attention = {
        part
        for child in block.modules()
        if child is not block and isinstance(getattr(child, "layer_idx", None), int)
        for part in child.modules()
    }
    matrices = {part: matrix for part in block.modules() if (matrix := _matrix(part)) is not None}
    back = [
        part
        for part, (out, into) in ((part, matrix.shape) for part, matrix in matrices.items())
        if out == width != into and part not in attention
    ]
    return back[0] if len(back) == 1 else None


def _matrix(module: nn.Module) -> Tensor | None:
    """The matrix [out, in] of a linear layer, or None for another module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.T if isinstance(module, Conv1D) else weight


def _unseen(name: str, why: str) -> ConfigError:
    return ConfigError(f"{name} cannot be inspected, since it {why}; inspect a decoder with plain attention")


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
