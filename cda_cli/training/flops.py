"""Floating-point operations of training, and the share that they are of what the device can do.

Only matrix products count, a multiplication and an addition as two. Two figures, both named wherever they are shown:

- *computed*: every product that the code makes. Causal attention makes half of them. Attention with coordinate descent
  goes over its scores a second time, and for k above 2 sums the values of free and capped entries apart. A fused
  backward computes the scores again, and activation checkpointing whole blocks.
- *dense*: 6N + 12·L·d·T a token (PaLM, arXiv 2204.02311, appendix B), whatever the code does: work that is wanted, not
  work that is done, so that implementations of different economy compare. N leaves out what is only looked up.

The feed-forward with coordinate descent counts whole: it computes every hidden unit, and selects among them. The zeros
that pad the projections of a compiled model with a number per head to whole heads do not count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cda_cli.config import Config, ModelConfig

# Dense bf16, FLOP/s, from NVIDIA's data sheets (there mostly with sparsity, which doubles them). The first name that is
# in the device's own wins.
PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


class Flops(NamedTuple):
    """Of one token, forward and backward."""

    computed: float
    dense: float


class _Attention(NamedTuple):
    """Products of attention: how many, each of a query with each of `keys`, forward and backward."""

    forward: int
    backward: int
    keys: float


def flops_per_token(config: Config, backend: str) -> Flops:
    """Of training with `config`, whose layers run on `backend` (see `ops.choose_backend`)."""
    model = config.model
    inner = model.heads * model.head_width
    block = _block_weights(model)
    logits = model.dim * model.vocab_size
    attention = _attention(model, backend)
    product = 2 * inner * attention.keys
    per_block = 6 * block + product * (attention.forward + attention.backward)
    if config.run.activation_checkpointing:
        # The last product of a block is not made again, as nothing backward needs it, unless dropout comes after it.
        unneeded = 0 if model.dropout else model.dim * model.ff_width
        per_block += 2 * (block - unneeded) + product * attention.forward
    N = model.depth * block + logits
    return Flops(
        computed=model.depth * per_block + 3 * 2 * logits,
        dense=6 * N + 12 * model.depth * inner * model.seq_len,
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device can do in `dtype`, or None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def _block_weights(model: ModelConfig) -> int:
    """Weights of a block that are multiplied with."""
    inner = model.heads * model.head_width
    budgets = (model.learned_k and model.attention == "coordinate-descent") + model.output_gate
    return model.dim * (4 * inner + 2 * model.ff_width + budgets * model.heads)


def _attention(model: ModelConfig, backend: str) -> _Attention:
    T, S = model.seq_len, model.seq_len + model.null_kv
    seen = (T + 1) / 2 + model.null_kv
    if model.attention == "softmax":
        # With null keys the mask is a tensor, and every score is computed. The backward computes the scores again.
        return _Attention(2, 5, S if model.null_kv else seen)
    if backend == "colt5":
        return _Attention(2, 4, S)
    if backend == "triton" and model.solver == "exact":
        # Scores twice, and the values, for k > 2 of free and of capped entries apart; then scores and ∂L/∂λ in two
        # kernels, and three gradients.
        return _Attention(3 if model.attn_k <= 2 else 4, 7, seen)
    return _Attention(2, 5, seen)
