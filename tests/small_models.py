"""Small models with random weights and a tokenizer, as `cda_cli.load` returns them, without a run."""

from __future__ import annotations

from pathlib import Path

import torch

from cda_cli.config import resolve
from cda_cli.data import load_tokenizer
from cda_cli.language_model import LanguageModel
from cda_cli.model import Transformer
from cda_cli.restore import Restored

SIZES = ("model.seq_len=24", "model.dim=16", "model.depth=2", "model.heads=2", "model.null_kv=1")


def random_model(*settings: str, seed: int = 0) -> LanguageModel:
    """A model of bytes on the CPU."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("bytes")
    config = resolve(sets=(*SIZES, f"model.vocab_size={tokenizer.vocab_size}", *settings))
    model = Transformer(config.model).eval()
    return LanguageModel(Restored(model, config, tokenizer, {}, Path("random"), torch.device("cpu")), torch.float32)
