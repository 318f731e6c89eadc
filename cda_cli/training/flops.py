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
from cda_cli.model import attention_rule, feed_forward_activation

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


def flops_per_token(config: Config, backend: str) -> Flops:
    """Of training with `config`, whose layers run on `backend` (see `ops.choose_backend`)."""
    model = config.model
    inner = model.heads * model.head_width
    block = _block_weights(model)
    logits = model.dim * model.vocab_size
    attention = attention_rule(model).products(backend)
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
    per_head = attention_rule(model).learns_budget + model.output_gate
    units = feed_forward_activation(model).matrices * model.ff_width
    return model.dim * (4 * inner + units + per_head * model.heads)
