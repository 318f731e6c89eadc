"""Converts the published model to ours: with the same weights, and with the iterative solver the same logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cda_cli.config import ModelConfig
from cda_cli.model.transformer import Transformer


def from_published(model: nn.Module) -> Transformer:
    """Makes a Transformer with the weights and settings of a `coordinate_descent_attention.Transformer` (0.0.11).

    It takes any object with these attributes, so the package itself is not needed. The solver is iterative, as in the
    published model. Only the output of a sparse feed-forward has no counterpart: the published code raises NameError.
    """
    published: Any = model
    ours = Transformer(_config(published))
    weights = {
        "token_embedding.weight": published.token_emb.weight,
        "position_embedding.weight": published.pos_emb.weight,
        **_named("norm", published.to_logits[0]),
        **_named("to_logits", published.to_logits[1]),
    }
    for layer, (attention, feed_forward) in enumerate(published.layers):
        block = f"blocks.{layer}"
        weights |= _named(f"{block}.attention_norm", attention.norm)
        weights |= _named(f"{block}.feed_forward_norm", feed_forward.proj_in[0])
        weights |= _named(f"{block}.feed_forward.proj_in", feed_forward.proj_in[1])
        weights |= _named(f"{block}.feed_forward.proj_out", feed_forward.proj_out)
        weights |= _named(f"{block}.attention.to_qkv", attention.to_qkv)
        weights |= _named(f"{block}.attention.to_out", attention.to_out)
        weights[f"{block}.attention.null_kv"] = attention.null_kv
        if ours.config.learned_k:
            weights |= _named(f"{block}.attention.to_learned_k", attention.to_learned_k)
    with torch.no_grad():
        ours.load_state_dict(weights)
    return ours.train(model.training).to(published.token_emb.weight.device)


def _named(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def _config(published: Any) -> ModelConfig:
    attention, feed_forward = published.layers[0]
    inner, dim = attention.to_out.in_features, attention.to_out.out_features
    return ModelConfig(
        vocab_size=published.token_emb.num_embeddings,
        seq_len=published.seq_len,
        dim=dim,
        depth=len(published.layers),
        heads=attention.heads,
        dim_head=inner // attention.heads,
        ff_width=feed_forward.proj_out.in_features,
        null_kv=attention.null_kv.shape[2],
        attention="coordinate-descent" if attention.use_coor_descent else "softmax",
        attn_k=attention.coor_descent_sparsity_k,
        attn_eps=attention.coor_descent_eps,
        learned_k=attention.use_coor_descent and attention.to_learned_k is not None,  # the published softmax ignores it
        ff="coordinate-descent" if feed_forward.use_coor_descent else "gelu",
        ff_k=feed_forward.coor_descent_sparsity_k,
        ff_eps=feed_forward.coor_descent_eps,
        solver="iterative",
        n_iters=attention.coor_descent_iters,
        eps_init=attention.coor_descent_eps_init,
        eps_decay=attention.coor_descent_eps_decay,
    )
