"""The batch size that is chosen fits the memory, and the number of samples."""

from __future__ import annotations

import pytest
import torch

from cda_cli.config import ModelConfig
from cda_cli.generation.batch_size import MOST, auto_batch_size
from cda_cli.model import Transformer


@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (5, 5), (10_000, MOST["cpu"])])
def test_a_small_model_takes_all_up_to_a_number(samples: int, expected: int) -> None:
    model = Transformer(ModelConfig(vocab_size=31, seq_len=16, dim=16, depth=1, heads=2))
    assert auto_batch_size(model, torch.float32, samples) == expected


def test_a_context_that_takes_the_memory_goes_on_alone() -> None:
    config = ModelConfig(vocab_size=31, seq_len=2**40, dim=64, depth=8, heads=2, position="none")
    with torch.device("meta"):
        model = Transformer(config)
    model.token_embedding.weight = torch.nn.Parameter(torch.zeros(31, 64))  # the device that its memory is on
    assert auto_batch_size(model, torch.float32, 8) == 1


def test_a_copy_of_the_weights_leaves_less_memory() -> None:
    """In float32 there is none."""
    config = ModelConfig(vocab_size=31, seq_len=16, dim=64, depth=1, heads=2, ff_mult=2.0**34)
    with torch.device("meta"):
        model = Transformer(config)
    model.token_embedding.weight = torch.nn.Parameter(torch.zeros(31, 64))  # the device that its memory is on
    assert [auto_batch_size(model, dtype, 8) for dtype in (torch.float32, torch.bfloat16)] == [8, 1]
