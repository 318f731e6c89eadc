"""The weights of a model that is one of the published package `coordinate_descent_attention`, for its Transformer.

    model.safetensors   its state dict, with the arguments of the Transformer in the metadata (see `published_file`)
    config.json         all arguments of the Transformer

`cda import published:model.safetensors` reads it back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cda_cli import strict_json
from cda_cli.config import ModelConfig
from cda_cli.errors import ConfigError
from cda_cli.interchange.conversion import to_theirs
from cda_cli.interchange.published_file import ARGUMENTS, DEFAULTS, PUBLISHED
from cda_cli.model import state_tensors
from cda_cli.restore import Restored
from cda_cli.storage import write_tensors

# The values that settings of `model` must have. The package fixes all of these.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "attention": ("softmax", "coordinate-descent"),
    "ff": ("gelu", "coordinate-descent"),
    "position": ("learned",),
    "norm": ("layernorm",),
    "norm_eps": (None, 1e-5),
    "qk_norm": (False,),
    "attn_bias": ("none",),
    "ff_bias": (True,),
    "tied_embeddings": (False,),
    "logits_bias": (True,),
    "normalise": ("none",),
    "output_gate": (False,),
    "learned_eps": (False,),
    "length_scaling": ("none",),
}
# The package fixes these too, where attention or feed-forward is sparse.
REQUIRED_IF_SPARSE: dict[str, tuple[Any, ...]] = {"solver": ("iterative",), "eps_init": (4.0,), "eps_decay": (0.7,)}

LOADING = """\
```python
import json
from coordinate_descent_attention import Transformer
from safetensors.torch import load_file

model = Transformer(**json.load(open("{name}/config.json")))
model.load_state_dict(load_file("{name}/model.safetensors"))
```
"""


def write_published(restored: Restored, folder: Path) -> str:
    """Writes the files into `folder`, and returns how to load them. Raises ConfigError for a model of another kind."""
    model = restored.config.model
    arguments = _arguments(model, restored.model.attention_eps)
    stated = {key: arguments[key] for key in DEFAULTS}
    tensors = to_theirs(PUBLISHED, model, state_tensors(restored.model))
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt", ARGUMENTS: json.dumps(stated)})
    (folder / "config.json").write_text(strict_json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    return LOADING


def _arguments(model: ModelConfig, attention_eps: float | None) -> dict[str, Any]:
    sparse_attention, sparse_ff = (kind == "coordinate-descent" for kind in (model.attention, model.ff))
    eps = {"attention": attention_eps} if sparse_attention else {}
    eps |= {"feed-forward": model.ff_eps} if sparse_ff else {}
    required = REQUIRED | (REQUIRED_IF_SPARSE if eps else {}) | {"kv_heads": (None, model.heads)}
    misfits = [
        f"{name}={getattr(model, name)}" for name, values in required.items() if getattr(model, name) not in values
    ]
    if len(set(eps.values())) > 1:
        misfits += [f"ff_eps={model.ff_eps}, as the ε of attention is {attention_eps:g}"]
    if misfits:
        raise ConfigError(
            f"the published model has no {', '.join(misfits)}; leave out --format published, or train without"
        )
    return {
        "num_tokens": model.vocab_size,
        "dim": model.dim,
        "seq_len": model.seq_len,
        "depth": model.depth,
        "dim_head": model.head_width,
        "heads": model.heads,
        "ff_mult": (model.ff_units + 0.5) / model.dim,  # The package rounds the width down.
        "attn_use_coor_descent": sparse_attention,
        "ff_use_coor_descent": sparse_ff,
        "attn_coor_descent_sparsity_k": model.attn_k,
        "ff_coor_descent_sparsity_k": model.ff_k,
        "coor_descent_iters": model.n_iters,
        "coor_descent_eps": next(iter(eps.values()), DEFAULTS["coor_descent_eps"]),
        "attn_null_kv": model.null_kv,
        "learned_sparsity_k": sparse_attention and model.learned_k,
    }
