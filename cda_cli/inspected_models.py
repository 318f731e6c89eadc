"""Does what `cda_cli.inspect` says: a run or a model of transformers, and a text → a `SparsityReport`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from cda_cli.causal import Examination, Examined, Wanted
from cda_cli.data import Batch, Encoded, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.inspection import LiveCollector, ReportWatcher, RowCollector, parse_size
from cda_cli.inspection.live_heads import follows_from_scores
from cda_cli.language_model import LanguageModel, load_language_model
from cda_cli.sparsity_report import SparsityReport


class TextTokenizer(Protocol):
    """A tokenizer of transformers, or another that has its two methods."""

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: list[int]) -> str: ...


InspectedModel = str | Path | LanguageModel | nn.Module


def inspect_model(
    model: InspectedModel,
    text: str,
    *,
    tokenizer: TextTokenizer | None,
    context: int | None,
    causal: bool,
    keep: float,
    budget: str | int,
    device: str,
    dtype: str,
    backend: str,
) -> SparsityReport:
    """Does what `cda_cli.inspect` says."""
    size = parse_size(budget)
    if isinstance(model, nn.Module):
        if causal:
            raise ConfigError(
                "causal checks take a run; import a model of transformers with cda import, or leave it out"
            )
        return _inspect_transformers(model, tokenizer, text, context, keep, size)
    if tokenizer is not None:
        raise ConfigError("a run has its tokenizer; leave tokenizer out")
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, best=False, ema=False, device=device, dtype=dtype, backend=backend)
    return _inspect_ours(model, text, context, causal, keep, size)


def _inspect_ours(
    lm: LanguageModel, text: str, context: int | None, causal: bool, keep: float, budget: int
) -> SparsityReport:
    restored, config = lm.restored, lm.config.model
    if context is not None and context > config.seq_len:
        raise ConfigError(f"the model takes {config.seq_len} tokens, and context is {context}; give that or less")
    collector = RowCollector(config.depth, budget, keep)
    live = LiveCollector() if follows_from_scores(lm.model) else None
    watcher = ReportWatcher(config.attn_k, collector=collector, live=live)
    windows = _windows(lm.encoded(text), lm.tokenizer.ending, config.seq_len if context is None else context)
    examination = Examination(causal, Wanted.of_selection(lm.model) if causal else Wanted([], []))
    examined = examination.run(restored, lm.dtype, watcher, lambda: windows)
    tokens = [lm.tokenizer.decode([int(token)]) for token in windows[0].inputs[0]]
    return SparsityReport(examined, collector.store(), tokens, _source(str(lm.path), text), live)


@torch.no_grad()
def _inspect_transformers(
    model: Any, tokenizer: TextTokenizer | None, text: str, context: int | None, keep: float, budget: int
) -> SparsityReport:
    """Inspects a model of transformers, where and as it is, in evaluation mode."""
    from cda_cli.observed_transformers import describe, observing

    if tokenizer is None:
        raise ConfigError("a model of transformers comes without its tokenizer; give tokenizer=")
    described = describe(model)
    collector = RowCollector(described.layers, budget, keep)
    watcher = ReportWatcher(described.largest_k, collector=collector)
    ids = np.array(tokenizer.encode(text))
    encoded = Encoded(ids, np.zeros(len(ids), np.uint8))  # Without losses no bytes are counted, nor the last target.
    ending = Encoded(*(each[-1:] for each in encoded))
    limits = [limit for limit in (context, described.context) if limit is not None]
    if not limits:
        raise ConfigError("the model takes any number of tokens; give context=, the tokens of a window")
    windows = _windows(encoded, ending, min(limits))
    training = model.training
    model.eval()
    try:
        with observing(model, watcher.see, watcher.see_residual):
            for tokens_BT in (window.inputs.to(model.device) for window in windows):
                watcher.begin(tokens_BT)
                # Nobody reads the logits, which the base model leaves out: they would take T × V numbers.
                model.base_model(input_ids=tokens_BT, use_cache=False)
    finally:
        model.train(training)
    tokens = [tokenizer.decode([int(token)]) for token in windows[0].inputs[0]]
    examined = Examined(watcher.report(), None, described.has_budget, described.eps)
    return SparsityReport(examined, collector.store(), tokens, _source(described.name, text))


def _windows(text: Encoded, ending: Encoded, context: int) -> list[Batch]:
    """The text in windows of one sequence each, whose inputs are all of its tokens; the last one reaches back.

    `ending` is the token that the last one predicts.
    """
    if context < 1:
        raise ConfigError(f"context is the tokens of a window, 1 or more, not {context}")
    if not len(text.ids):
        raise ConfigError("the text is empty; give one token at least")
    return list(evaluation_batches(Tokens(*Encoded.join([text, ending]), text_bytes=0), context, 1))


def _source(model: str, text: str) -> dict[str, str]:
    """The name of the model, and a digest that tells one text from another in few characters."""
    return {"model": model, "text": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}
