"""How many samples go on together: as many as fit the memory, up to a number that keeps the device busy."""

from __future__ import annotations

import torch

from cda_cli.generation.decoder import linear_parameters
from cda_cli.model import Transformer
from cda_cli.runtime import available_memory

MOST = {"cuda": 256, "cpu": 32}  # keep the device busy
SHARE = 0.5  # of the memory that is left; the rest is for the text of the prompts, which is read in larger pieces
LOGITS_BYTES = 64  # for each token of the vocabulary: its logit, its probability in float64, their order and their sums


def auto_batch_size(model: Transformer, dtype: torch.dtype, samples: int) -> int:
    """Returns the batch size for `samples` samples: at least 1, and at most MOST for its kind of device.

    A sample takes its keys and values of the whole context, in `dtype`, and its logits. Generation also copies the
    weights of the linears, unless `dtype` is float32.
    """
    config, device = model.config, model.token_embedding.weight.device
    if device.type == "cuda":
        left: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        left = available_memory()
    slots = config.depth * config.key_heads * (config.null_kv + config.seq_len)
    row = 2 * slots * config.head_width * dtype.itemsize + LOGITS_BYTES * config.vocab_size
    weights = sum(parameter.numel() for parameter in linear_parameters(model))
    copied = 0 if dtype == torch.float32 else weights * dtype.itemsize
    fitting = samples if left is None else int(SHARE * (left - copied)) // row
    return max(1, min(samples, fitting, MOST[device.type]))
