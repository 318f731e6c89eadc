"""Draws the next token of each row of a batch, on the device of the model, by the settings and the seed of that row.

Shapes: B rows, V vocabulary, N alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cda_cli.generation.requests import Request, SamplingSettings
from cda_cli.ops import Backend, can_run_kernels, draw_token

UNIFORMS = 1024  # random numbers of a row that are on the device at a time


class Drawn(NamedTuple):
    """Tokens [B], int64; if anybody asks for them, the log-probability of each [B], and N tokens and theirs [B, N]."""

    tokens_B: Tensor
    logprob_B: Tensor | None = None
    likeliest_BN: Tensor | None = None
    logprob_BN: Tensor | None = None


class Filters(NamedTuple):
    """The temperature and the filters of each row, float64 or int64 [B]; None where no row has such a filter."""

    temperature_B: Tensor
    top_k_B: Tensor | None
    top_p_B: Tensor | None
    min_p_B: Tensor | None

    @property
    def are_unused(self) -> bool:
        """Whether nothing is filtered, whatever the temperature."""
        return self.top_k_B is None and self.top_p_B is None and self.min_p_B is None


def filtered_probabilities(logits_BV: Tensor, filters: Filters) -> Tensor:
    """Returns the probabilities [B, V], float64, after temperature and filters. At least one token always stays."""
    temperature_B, top_k_B, top_p_B, min_p_B = filters
    # The logits are at most 0 and float64, so that a tiny temperature makes neither inf nor NaN.
    logits = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / temperature_B.unsqueeze(-1)
    if top_k_B is not None or top_p_B is not None:
        ordered, order = logits.sort(-1, descending=True)
        if top_k_B is not None:
            smallest = ordered.gather(-1, (top_k_B - 1).unsqueeze(-1))
            logits = logits.masked_fill(logits < smallest, -torch.inf)
            ordered = ordered.masked_fill(ordered < smallest, -torch.inf)
        if top_p_B is not None:
            shares = ordered.softmax(-1)
            beyond = shares.cumsum(-1) - shares >= top_p_B.unsqueeze(-1)
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p_B is not None:
        least = min_p_B.unsqueeze(-1) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def filtered_distribution(logits_V: Tensor, settings: SamplingSettings) -> Tensor:
    """Returns the probabilities [V], float32, after temperature and filters. At least one token always stays.

    The temperature must be above 0. There are no penalties, as no text stands before the token.
    """
    rows = _Settings([settings], 1, len(logits_V), logits_V.device)
    rows.set(0, settings)
    return filtered_probabilities(logits_V[None], rows.filters(slice(None)))[0].float()


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Returns the token of each row, int64 [B], whose share of [0, 1) holds its `uniform_B`, float64 [B].

    `probabilities_BV` are float64. Shares below 2⁻⁵³ count as 0.
    """
    # A GPU adds in any order: sums of fractions would depend on it, and PyTorch refuses them where it is to be
    # deterministic. Sums of whole numbers are exact.
    sums = (probabilities_BV * 2**52).round().long().cumsum(-1)
    return (sums > (uniform_B * sums[:, -1]).long().unsqueeze(-1)).to(torch.int8).argmax(-1)


class Sampler:
    """The settings, the random numbers and the text of each row of a batch. Rows enter, move and leave.

    Random number i of a row is number i of the generator Philox with its seed as key. It depends on nothing else.
    `backend` is that of the model: with "torch" no kernel of Triton draws.
    """

    def __init__(
        self, requests: Sequence[Request], rows: int, vocab_size: int, device: torch.device, backend: Backend
    ) -> None:
        settings = [request.settings for request in requests]
        self._settings = _Settings(settings, rows, vocab_size, device)
        self._penalises = any(each.repetition_penalty != 1 or each.presence_penalty != 0 for each in settings)
        self._greedy = [each.temperature == 0 for each in settings]
        self._backend = backend
        self._logprobs = max((request.logprobs for request in requests), default=0)
        self._alternatives = min(self._logprobs, vocab_size)
        self._bits: list[np.random.Philox | None] = [None] * rows
        self._uniform = torch.zeros(rows, UNIFORMS, dtype=torch.float64, device=device)
        self._count_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._true = torch.ones((), dtype=torch.bool, device=device)
        has_text = (rows, vocab_size if self._penalises else 0)
        self._read, self._generated = (torch.zeros(has_text, dtype=torch.bool, device=device) for _ in range(2))

    def enter(self, row: int, request: Request) -> None:
        """Gives a row to a request."""
        self._settings.set(row, request.settings)
        self._bits[row] = np.random.Philox(key=request.seed)
        self._count_B[row] = 0
        if self._penalises:
            self._read[row] = False
            self._read[row, torch.tensor(request.prompt, device=self._read.device)] = True
            self._generated[row] = False

    def prepare(self, row: int, count: int) -> None:
        """Is to be called before a draw: `count` tokens of the row were drawn so far."""
        bits = self._bits[row]
        if count % UNIFORMS == 0 and bits is not None:
            # 52 bits: the largest number times a sum stays below that sum.
            fresh = (bits.random_raw(UNIFORMS) >> np.uint64(12)).astype(np.float64) * 2.0**-52
            self._uniform[row] = torch.from_numpy(fresh)

    def move_row(self, source: int, target: int) -> None:
        """Copies a row into another one."""
        self._bits[target] = self._bits[source]
        for tensor in (*self._settings.tensors(), self._uniform, self._count_B, self._read, self._generated):
            tensor[target] = tensor[source]

    def draw(self, logits_BV: Tensor, rows: slice | Tensor) -> Drawn:
        """Draws a token for each of `rows`, whose logits these are."""
        logits = logits_BV
        if self._penalises:
            logits = self._settings.penalised(logits.float(), rows, self._read[rows], self._generated[rows])
        tokens = self._drawn(logits, rows)
        if self._penalises:
            places = torch.arange(len(self._read), device=tokens.device)[rows]
            # A CUDA graph cannot hold the copy of a number of Python's to the device.
            self._read[places, tokens] = self._generated[places, tokens] = self._true
        if not self._logprobs:
            return Drawn(tokens)
        logprob_BV = logits_BV.float().log_softmax(-1)
        likeliest = logprob_BV.topk(self._alternatives)
        return Drawn(tokens, logprob_BV.gather(1, tokens[:, None]).squeeze(1), likeliest.indices, likeliest.values)

    def _drawn(self, logits_BV: Tensor, rows: slice | Tensor) -> Tensor:
        """Draws a token for each row after penalties, and counts it."""
        filters, count_B = self._settings.filters(rows), self._count_B[rows]
        if all(self._greedy):
            tokens = logits_BV.argmax(-1)
        elif filters.are_unused and can_run_kernels(self._backend, logits_BV.device, logits_BV.dtype, 0):
            greedy_B = self._settings.greedy_B[rows]
            tokens = draw_token(logits_BV, filters.temperature_B, greedy_B, self._uniform[rows], count_B)
        else:
            probabilities = filtered_probabilities(logits_BV.float(), filters)
            uniform_B = self._uniform[rows].gather(1, (count_B % UNIFORMS).unsqueeze(1)).squeeze(1)
            tokens = draw(probabilities, uniform_B)
            if any(self._greedy):
                tokens = torch.where(self._settings.greedy_B[rows], logits_BV.argmax(-1), tokens)
        self._count_B[rows] = count_B + 1
        return tokens


class _Settings:
    """The settings of each row as tensors [B]. A filter that nobody asks for is left out."""

    def __init__(self, asked: Sequence[SamplingSettings], rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._temperature_B, self._top_p_B, self._min_p_B, self._repetition_B, self._presence_B = (
            torch.ones(rows, dtype=torch.float64, device=device) for _ in range(5)
        )
        self._top_k_B = torch.ones(rows, dtype=torch.int64, device=device)
        self.greedy_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self._has_top_k = any(each.top_k is not None for each in asked)
        self._has_top_p = any(each.top_p is not None for each in asked)
        self._has_min_p = any(each.min_p is not None for each in asked)

    def set(self, row: int, settings: SamplingSettings) -> None:
        temperature, top_k, top_p, min_p, repetition, presence = settings
        self.greedy_B[row] = temperature == 0
        self._temperature_B[row] = temperature or 1.0
        self._top_k_B[row] = min(top_k or self._vocab_size, self._vocab_size)
        # With a share of 1 no token may go, though the sum of others may round to 1.
        self._top_p_B[row] = torch.inf if top_p is None or top_p >= 1 else top_p
        self._min_p_B[row] = min_p or 0.0
        self._repetition_B[row], self._presence_B[row] = repetition, presence

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def filters(self, rows: slice | Tensor) -> Filters:
        return Filters(
            self._temperature_B[rows],
            self._top_k_B[rows] if self._has_top_k else None,
            self._top_p_B[rows] if self._has_top_p else None,
            self._min_p_B[rows] if self._has_min_p else None,
        )

    def penalised(self, logits_BV: Tensor, rows: slice | Tensor, read_BV: Tensor, generated_BV: Tensor) -> Tensor:
        """Returns the logits after the penalties of tokens that were read or generated."""
        repetition, presence = self._repetition_B[rows].float()[:, None], self._presence_B[rows].float()[:, None]
        repeated = torch.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
        return torch.where(read_BV, repeated, logits_BV) - presence * generated_BV
