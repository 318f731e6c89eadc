"""The model needs no compiler, which takes as long to import as torch itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from cda_cli.config import ModelConfig
from cda_cli.model import Transformer, model_of_shapes

model_of_shapes(ModelConfig(null_kv=1, tied_embeddings=True))  # with which a checkpoint is compared
for ff in ("coordinate-descent", "blocks"):
    with torch.no_grad():
        Transformer(ModelConfig(seq_len=8, dim=64, depth=1, ff=ff))(torch.zeros(1, 8, dtype=torch.long))
print(*sys.modules)
"""


@pytest.mark.slow
def test_the_model_loads_and_computes_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert {"torch", "torch._dynamo", "sympy"} & set(done.stdout.split()) == {"torch"}
