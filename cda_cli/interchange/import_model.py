"""A model of another tool → an ordinary run, whose first checkpoint holds its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cda_cli import strict_json
from cda_cli.config import Config, parse, resolve
from cda_cli.data import ByteTokenizer, tokenizer_from_json
from cda_cli.errors import CheckpointError
from cda_cli.interchange.conversion import to_ours
from cda_cli.interchange.source import Source, open_source
from cda_cli.interchange.source_tokenizer import TOKENIZER_FILE, SourceTokenizer, fitted
from cda_cli.model import Transformer, attention_rule, expected_tensors, load_state_tensors
from cda_cli.ops import Backend
from cda_cli.restore import Restored
from cda_cli.runs.folder import ORIGIN_FILE, Run
from cda_cli.runtime import random_states
from cda_cli.storage import check_free, publish, published_folder
from cda_cli.version import __version__

FINE_TUNING_RATE = 5e-5  # transformers.TrainingArguments has the same
# The soft top-k with k = 1 and ε = 1 is softmax, so a run that goes on with it starts from the imported model.
AS_SOFTMAX = {"attn_k": 1.0, "attn_eps": 1.0}
# With another k its weights sum to k. Divided by k, the output stays as near to that of softmax as it can.
SOFT_TOP_K = {"attention": "coordinate-descent", "normalise": "k"}

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


class Imported(NamedTuple):
    """What was imported. `origin` is what source.json holds."""

    run: Path
    config: Config
    parameters: int
    origin: dict[str, Any]

    @property
    def attention(self) -> str:
        """The attention rule in a few words."""
        rule = attention_rule(self.config.model)
        return rule.description(self.config.model.attn_eps if rule.has_eps else None)

    def as_dict(self) -> dict[str, Any]:
        about = {"run": str(self.run), "parameters": self.parameters, "attention": self.attention}
        return about | self.origin | {"model": self.config.model.model_dump(mode="json")}


def import_model(
    name: str,
    out: Path,
    progress: Progress,
    *,
    seq_len: int | None = None,
    attn_k: float | None = None,
    attn_eps: float | None = None,
    tokenizer: str | None = None,
    sets: Sequence[str] = (),
) -> Imported:
    """Makes `out` a run of the model `name` (see `open_source`).

    Its attention is softmax, or with `attn_k` or `attn_eps` the soft top-k, whose output is divided by k so that its
    weights sum to 1 as before. `sets` are further settings, as `--set` takes them. `progress` gets the number of
    tensors. `out` appears whole or not at all.

    Raises ConfigError or CheckpointError for what cannot be imported, and StorageError if the write fails.
    """
    check_free(out)
    source = open_source(name, seq_len, tokenizer)
    rule = {} if attn_k is None and attn_eps is None else SOFT_TOP_K
    flags = {"model.attn_k": attn_k, "model.attn_eps": attn_eps}
    tokens = fitted(source.tokenizer, source.settings["vocab_size"]) if source.tokenizer else None
    config = resolve(sets=sets, flags=flags, base=_config(source, rule, tokens, out))
    _check_vocabulary(config, tokens)
    _check_depth(config, source)
    with progress(len(expected_tensors(config.model))) as advance:
        weights: dict[str, Tensor] = {}
        for ours, tensor in to_ours(source.tensors, config.model, source.readers, source.derived):
            weights[ours] = tensor
            advance(1)
    _write(out, config, weights, tokens, source.origin)
    return Imported(out, config, sum(tensor.numel() for tensor in weights.values()), source.origin)


def restore_folder(folder: Path, device: torch.device, backend: Backend) -> Restored:
    """Restores the model of a folder that `cda export` or transformers wrote, as `restore` does that of a checkpoint.

    Of its settings only those of the model and the tokenizer are known, and nothing of a run. Raises what
    `import_model` raises for a model that cannot be read.
    """
    source = open_source(str(folder))
    tokens = fitted(source.tokenizer, source.settings["vocab_size"]) if source.tokenizer else None
    config = _config(source, {}, tokens, folder)
    _check_vocabulary(config, tokens)
    _check_depth(config, source)
    weights = dict(to_ours(source.tensors, config.model, source.readers, source.derived))
    model = Transformer(config.model, backend)
    load_state_tensors(model, weights)
    data = config.data
    tokenizer = tokenizer_from_json(tokens.text if tokens else None, data.tokenizer, data.bos, data.eos)
    return Restored(model.to(device).eval(), config, tokenizer, {}, folder, device)


def _config(source: Source, rule: Mapping[str, str], tokens: SourceTokenizer | None, out: Path) -> Config:
    """The settings of the run before any that a person gives, with those of the attention `rule`."""
    softmax: Mapping[str, Any] = AS_SOFTMAX if source.settings["attention"] == "softmax" else {}
    data: dict[str, Any] = {"tokenizer": "bytes"}
    if tokens is not None:
        data = {"tokenizer": str(out.absolute() / TOKENIZER_FILE), "bos": tokens.bos, "eos": tokens.eos}
    return parse({"model": {**source.settings, **softmax, **rule}, "data": data, "optim": {"lr": FINE_TUNING_RATE}})


def _check_vocabulary(config: Config, tokens: SourceTokenizer | None) -> None:
    """Raises CheckpointError if the run's tokenizer would have other tokens than the model."""
    rows, data = config.model.vocab_size, config.data
    if tokens is None and rows != ByteTokenizer.vocab_size:
        raise CheckpointError(
            f"the model has {rows:,} tokens, and bytes are 256; give cda import its tokenizer.json by --tokenizer"
        )
    if tokens is not None and tokenizer_from_json(tokens.text, bos=data.bos, eos=data.eos).vocab_size != rows:
        raise CheckpointError(
            "no special token of the tokenizer is known to end a document; name one in its tokenizer_config.json "
            "(eos_token), or to cda import with --set data.eos=TOKEN"
        )


def _check_depth(config: Config, source: Source) -> None:
    """Raises CheckpointError for more blocks than there are tensors, before any of them is made."""
    if config.model.depth > len(source.readers):
        raise CheckpointError(
            f"the model has {len(source.readers)} tensors, too few for the {config.model.depth:,} blocks of its "
            "configuration; download it again"
        )


def _write(
    out: Path, config: Config, weights: Mapping[str, Tensor], tokens: SourceTokenizer | None, origin: Mapping[str, Any]
) -> None:
    text = tokens.text if tokens else None
    torch.manual_seed(config.run.seed)
    with published_folder(out, over_empty=True) as folder:
        publish(
            folder,
            step=0,
            model=weights,
            optimizer={},
            rng=random_states(torch.device("cpu")),
            state={
                "step": 0,
                "tokens": 0,
                "position": None,
                "data": None,
                "validation_loss": None,
                "config": config.model_dump(mode="json"),
                "optimizer": {},
                "versions": {"cda": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]},
            },
            tokenizer_json=text,
        )
        Run(folder).write_config(config)
        (folder / ORIGIN_FILE).write_text(strict_json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        if text is not None:
            (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
