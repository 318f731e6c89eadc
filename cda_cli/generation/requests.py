"""What is asked of a generation, and what comes out of it."""

from __future__ import annotations

import math
from typing import NamedTuple

from cda_cli.errors import ConfigError


class SamplingSettings(NamedTuple):
    """How tokens are drawn. Temperature 0 takes the likeliest. The filters apply in the order top_k, top_p, min_p.

    The penalties change the logits before that. `repetition_penalty` divides those of tokens that the text has, prompt
    included, by this number where they are positive, and multiplies them where they are negative (CTRL, arXiv
    1909.05858, section 4.1). `presence_penalty` is subtracted from those of tokens that were generated.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for a setting without meaning."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k keeps that many tokens, so it must be 1 or more, not {self.top_k}")
        for name, share in (("--top-p", self.top_p), ("--min-p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} is a share, above 0 and at most 1, not {share}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"--repetition-penalty must be above 0 and finite, not {self.repetition_penalty}")
        if not math.isfinite(self.presence_penalty):
            raise ConfigError(f"--presence-penalty must be finite, not {self.presence_penalty}")


class Request(NamedTuple):
    """A prompt to go on from, for at most `max_new_tokens` tokens.

    The text depends on the model, the prompt, the settings and the seed alone. `logprobs` is the number of
    alternatives that are wanted with each token; with 0 there is no log-probability either.
    """

    prompt: list[int]
    max_new_tokens: int
    settings: SamplingSettings
    seed: int
    logprobs: int = 0


class Generated(NamedTuple):
    """A token of a request, which is named by its place among the requests.

    `logprob` is the natural logarithm of the probability that the model gives to the token, before temperature,
    filters and penalties. `alternatives` are the likeliest tokens with theirs, the likeliest first.
    """

    request: int
    token: int
    logprob: float | None = None
    alternatives: list[tuple[int, float]] = []  # noqa: RUF012  # a NamedTuple's default, which nobody changes
