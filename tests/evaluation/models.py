"""Models of which one can say what they predict."""

from __future__ import annotations

from pathlib import Path

import torch

from cda_cli.config import parse
from cda_cli.data import load_tokenizer
from cda_cli.model import Transformer
from cda_cli.restore import Restored

SUCCESSOR_LOGIT = 6.0


def successor_model(seq_len: int = 64) -> Restored:
    """A model of bytes that reads the last byte alone: after byte b it expects b + 1, and all others alike."""
    settings = {
        "seq_len": seq_len, "dim": 256, "depth": 1, "heads": 2, "position": "none", "norm": "rmsnorm",
        "tied_embeddings": False, "logits_bias": False,
    }  # fmt: skip
    config = parse({"model": settings})
    model = Transformer(config.model).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.token_embedding.weight.copy_(torch.eye(256))
        # The norm makes 16 of the one in each embedding.
        model.to_logits.weight.copy_(torch.eye(256).roll(1, 0) * SUCCESSOR_LOGIT / 16)
    return Restored(model, config, load_tokenizer("bytes"), {}, Path("nowhere"), torch.device("cpu"))
