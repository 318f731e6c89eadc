"""Counts the floating-point operations of training, and knows how many a device can do.

Only matrix products count; a multiplication and an addition are two operations. There are two counts, and whoever
shows one names it:

- *computed*: every product that the code computes. Each attention rule says how many its own code computes
  (`model.rules`). Activation checkpointing computes those of a block again.
- *dense*: 6N + 12·L·d·T a token (PaLM, arXiv 2204.02311, appendix B), whatever the code does. It counts the work
  that is wanted, not the work that is done, so it compares implementations. N leaves out weights that are only looked
  up.

A sparse feed-forward counts in full, because it computes every hidden unit before it selects. The zeros that pad a
packed projection (`model.head_projection`) or a vocabulary (`model.loss`) do not count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cda_cli.config import Config, ModelConfig
from cda_cli.model import attention_rule, feed_forward_activation

# Dense bf16 FLOP/s by NVIDIA's data sheets, most of which give the number with sparsity, twice as high. The first name
# that is a part of the device's name wins.
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
    """Floating-point operations of one token, forward and backward."""

    computed: float
    dense: float


def flops_per_token(config: Config, backend: str, device: torch.device, dtype: torch.dtype) -> Flops:
    """Counts the operations of training with `config` in `dtype` on `device`, with the operator on `backend`."""
    model = config.model
    inner = model.heads * model.head_width
    block = _block_weights(model)
    logits = model.dim * model.vocab_size
    rule = attention_rule(model)
    truncated = config.optim.truncated_share  # of the steps, with dense weights
    attention, dense = rule.products(backend, device, dtype), rule.dense_products()
    forward, backward = (
        2 * inner * ((1 - truncated) * attention.keys * of_rule + truncated * dense.keys * of_dense)
        for of_rule, of_dense in ((attention.forward, dense.forward), (attention.backward, dense.backward))
    )
    per_block = 6 * block + forward + backward
    if config.run.activation_checkpointing:
        # The backward does not need the last product of a block, so it is computed again only if dropout follows it.
        unneeded = 0 if model.dropout else model.dim * model.ff_units
        per_block += 2 * (block - unneeded) + forward
    N = model.depth * block + logits
    return Flops(
        computed=model.depth * per_block + 3 * 2 * logits,
        dense=6 * N + 12 * model.depth * inner * model.seq_len,
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the FLOP/s that the device can do in `dtype`, or None if that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def _block_weights(model: ModelConfig) -> int:
    """Counts the weights of a block that take part in a matrix product."""
    inner, of_keys = model.heads * model.head_width, model.key_heads * model.head_width
    per_head = attention_rule(model).learns_budget + model.output_gate
    units = feed_forward_activation(model).total_width
    scaling = 2 * model.scaled_heads if model.length_scaling == "adaptive" else 0
    return model.dim * (2 * inner + 2 * of_keys + units + per_head * model.heads + scaling)
