"""The files of a folder that transformers loads, written without transformers.

    config.json              the settings of the model, and the ε of the saved step
    model.safetensors        the weights, a shared one once
    tokenizer.json           the tokenizer, and tokenizer_config.json its special tokens
    generation_config.json   the tokens that begin, end and pad a text
    modeling_cda.py          imports the model from this package (`hf`), with trust_remote_code=True

A model that is one of a family of transformers is written as that. It needs none of our code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cda_cli import strict_json
from cda_cli.interchange.conversion import to_theirs
from cda_cli.interchange.families import FAMILIES, family_config, plain_family
from cda_cli.interchange.hf_tokenizer import HfTokenizer, hf_tokenizer
from cda_cli.model import state_tensors
from cda_cli.restore import Restored
from cda_cli.storage import write_tensors

MODEL_TYPE = "cda"
REMOTE_CODE = "modeling_cda.py"
AUTO_MAP = {
    auto_class: f"{Path(REMOTE_CODE).stem}.{ours}"
    for auto_class, ours in (("AutoConfig", "CdaConfig"), ("AutoModelForCausalLM", "CdaForCausalLM"))
}


USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
```
"""
LOADING_FAMILY = f"```python\n{USE}"
LOADING_OWN = f"""\
```python
import cda_cli.interchange.hf  # of the package cda-cli
{USE}
Without the first line, both calls of `from_pretrained` need `trust_remote_code=True`.
"""


def write_hf(restored: Restored, folder: Path) -> str:
    """Writes the files into `folder`, and returns how to load them.

    Raises DataError for a tokenizer that has no place for its separator.
    """
    model, weights = restored.config.model, state_tensors(restored.model)
    family = plain_family(model)
    if family is None:
        config = _own_config(restored)
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        write_remote_code(folder)
    else:
        config = family_config(family, model)
        weights = to_theirs(FAMILIES[family].tensors, model, weights)
    tokenizer = hf_tokenizer(restored.tokenizer)
    # Without these a family has those of its first models, such as 50256. A token that pads would never be trained.
    marks = {f"{role}_token_id": tokenizer.special[role] for role in ("bos", "eos")}
    _write_json(folder / "config.json", config | marks)
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    _write_tokenizer(restored, tokenizer, folder)
    return LOADING_OWN if family is None else LOADING_FAMILY


def _write_tokenizer(restored: Restored, tokenizer: HfTokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.inner.to_str(), encoding="utf-8")
    tokens = {f"{role}_token": tokenizer.inner.id_to_token(id) for role, id in tokenizer.special.items()}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": restored.config.model.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", about | tokens)
    ids = {f"{role}_token_id": id for role, id in tokenizer.special.items()}
    _write_json(folder / "generation_config.json", ids)


def write_remote_code(folder: Path) -> None:
    """Writes the module that `AUTO_MAP` names."""
    (folder / REMOTE_CODE).write_bytes(Path(__file__).with_name(REMOTE_CODE).read_bytes())


def _own_config(restored: Restored) -> dict[str, Any]:
    return {
        "architectures": ["CdaForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "settings": restored.config.model.model_dump(),
        "attention_eps": restored.model.attention_eps,
    }


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(strict_json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
