"""Converts the published model to ours: with the same weights, and with the iterative solver the same logits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cda_cli.config import ModelConfig
from cda_cli.model.transformer import Transformer

# Our modules and parameters, and theirs. {} stands for the number of the block.
PUBLISHED_NAMES = {
    "token_embedding": "token_emb",
    "position_embedding": "pos_emb",
    "norm": "to_logits.0",
    "to_logits": "to_logits.1",
    "blocks.{}.attention_norm": "layers.{}.0.norm",
    "blocks.{}.attention.to_qkv": "layers.{}.0.to_qkv",
    "blocks.{}.attention.to_out": "layers.{}.0.to_out",
    "blocks.{}.attention.to_learned_k": "layers.{}.0.to_learned_k",
    "blocks.{}.attention.null_kv": "layers.{}.0.null_kv",
    "blocks.{}.feed_forward_norm": "layers.{}.1.proj_in.0",
    "blocks.{}.feed_forward.proj_in": "layers.{}.1.proj_in.1",
    "blocks.{}.feed_forward.proj_out": "layers.{}.1.proj_out",
}


def from_published(model: nn.Module) -> Transformer:
    """Makes a Transformer with the weights and settings of a `coordinate_descent_attention.Transformer` (0.0.11).

    It takes any object with these attributes, so the package itself is not needed. The solver is iterative, as in the
    published model. Only the output of a sparse feed-forward has no counterpart: the published code raises NameError.
    """
    published: Any = model
    tensors = model.state_dict()
    attention, feed_forward = published.layers[0]
    config = published_config(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        attention="coordinate-descent" if attention.use_coor_descent else "softmax",
        attn_k=attention.coor_descent_sparsity_k,
        attn_eps=attention.coor_descent_eps,
        ff="coordinate-descent" if feed_forward.use_coor_descent else "gelu",
        ff_k=feed_forward.coor_descent_sparsity_k,
        ff_eps=feed_forward.coor_descent_eps,
        n_iters=attention.coor_descent_iters,
        eps_init=attention.coor_descent_eps_init,
        eps_decay=attention.coor_descent_eps_decay,
    )
    ours = Transformer(config)
    ours.load_state_dict({name: tensors[published_name(name)] for name in ours.state_dict()})
    return ours.train(model.training).to(published.token_emb.weight.device)


def published_name(name: str) -> str:
    """The name that the published model gives to our tensor `name`."""
    block = re.match(r"blocks\.(\d+)\.", name)
    general = name if block is None else f"blocks.{{}}.{name[block.end() :]}"
    ours = next(each for each in PUBLISHED_NAMES if general == each or general.rpartition(".")[0] == each)
    return (PUBLISHED_NAMES[ours] + general.removeprefix(ours)).replace("{}", block[1] if block else "")


def published_config(shapes: Mapping[str, Sequence[int]], **settings: Any) -> ModelConfig:
    """The configuration of a published model whose tensors have these `shapes`. `settings` do not show in a shape.

    Raises KeyError where a tensor is missing.
    """
    vocab_size, dim = shapes["token_emb.weight"]
    _, heads, null_kv, head_width = shapes["layers.0.0.null_kv"]
    return ModelConfig(
        vocab_size=vocab_size,
        seq_len=shapes["pos_emb.weight"][0],
        dim=dim,
        depth=sum(name.endswith(".null_kv") for name in shapes),
        heads=heads,
        dim_head=head_width,
        ff_width=shapes["layers.0.1.proj_out.weight"][1],
        null_kv=null_kv,
        learned_k=settings["attention"] != "softmax" and "layers.0.0.to_learned_k.weight" in shapes,
        solver="iterative",
        **settings,
    )
