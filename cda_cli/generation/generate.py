"""Generates tokens with a model, one at a time.

prompt → prefill the cache → logits → filtered distribution → token → …  When the context is full, the model reads the
newer half of it again, and generation goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.errors import ConfigError
from cda_cli.model import KeyValueCache, Transformer
from cda_cli.runtime import autocast


class SamplingSettings(NamedTuple):
    """How tokens are drawn. Temperature 0 takes the likeliest. The filters apply in the order top_k, top_p, min_p."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def check(self) -> None:
        """Raises ConfigError for a setting without meaning."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k keeps that many tokens, so it must be 1 or more, not {self.top_k}")
        for name, share in (("--top-p", self.top_p), ("--min-p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} is a share, above 0 and at most 1, not {share}")


def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    settings: SamplingSettings,
    *,
    seed: int,
    separator: int | None = None,
    dtype: torch.dtype = torch.float32,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields at most `max_new_tokens` tokens that follow `prompt`, and ends before a `separator`.

    The draw depends on the seed and the logits alone; `dtype` is that of the matrix products. Raises ConfigError, at
    once, for an empty prompt, or one that is longer than the context.
    """
    context = model.config.seq_len
    settings.check()
    if not prompt:
        raise ConfigError("the prompt is empty; give it at least one character")
    if len(prompt) > context:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and the model's context {context}; shorten the prompt to fit"
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens = _tokens(model, prompt, settings, generator, dtype, use_cache)
    return itertools.takewhile(lambda token: token != separator, itertools.islice(tokens, max_new_tokens))


@torch.no_grad()
def _tokens(
    model: Transformer,
    prompt: list[int],
    settings: SamplingSettings,
    generator: torch.Generator,
    dtype: torch.dtype,
    use_cache: bool,
) -> Iterator[int]:
    """Yields tokens without end. The model sees those from `start` on."""
    context, device = model.config.seq_len, next(model.parameters()).device
    seen, start, cache = list(prompt), 0, None
    while True:
        if len(seen) - start > context:
            start, cache = len(seen) - context // 2, None
        if use_cache and cache is None:
            cache = KeyValueCache(model.config, 1, device, dtype)
        unread = seen[start + cache.length if cache else start :]
        with autocast(device, dtype):
            logits = model(torch.tensor([unread], device=device), cache)[0, -1]
        seen.append(_draw(logits.float().cpu(), settings, generator))
        yield seen[-1]


def filtered_distribution(logits_V: Tensor, settings: SamplingSettings) -> Tensor:
    """Returns the probabilities [V], float32, after temperature and filters. At least one token always stays.

    The temperature must be above 0.
    """
    # The logits are at most 0 and float64, so that a tiny temperature makes neither inf nor NaN.
    logits = (logits_V - logits_V.max()).double() / settings.temperature
    if settings.top_k is not None and settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1).float()
    if settings.top_p is not None and settings.top_p < 1:
        order = logits.argsort(descending=True)  # different logits may round to the same probability
        ordered = probabilities[order]
        beyond = ordered.cumsum(-1) - ordered >= settings.top_p
        probabilities = probabilities.scatter(0, order[beyond], 0.0)
    if settings.min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < settings.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()


def _draw(logits_V: Tensor, settings: SamplingSettings, generator: torch.Generator) -> int:
    if settings.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(filtered_distribution(logits_V, settings), 1, generator=generator))
