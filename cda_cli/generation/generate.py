"""Generates tokens for many requests, in batches in which each row is as it is alone.

request → prefill of its row in the cache → logits → draw → token → one position more → logits → …

A row that has ended makes room for a waiting request. When the context of a row is full, the model reads the newer half
of its text again, and the row goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cda_cli.errors import ConfigError
from cda_cli.generation.requests import Generated, Request, SamplingSettings
from cda_cli.generation.sampling import Drawn, Sampler
from cda_cli.model import StaticCache, Transformer
from cda_cli.runtime import autocast

Reason = Literal["length", "eos", "stop", "context"]

PREFILL_TOKENS = 16384  # read in one pass, of all rows together, but at least PREFILL_POSITIONS of each
PREFILL_POSITIONS = 256


@dataclass(eq=False)
class _Row:
    """A request in a row of the batch."""

    request: int
    limit: int  # tokens that it may get
    reason: Reason  # why it ends then
    text: list[int]  # the prompt and the tokens that are known
    drawn: int = 0  # tokens that were drawn, on the device
    length: int = 0  # positions in the cache


class _Draw(NamedTuple):
    """What was drawn in one pass, for which rows."""

    rows: list[_Row]
    drawn: Drawn


class Generation:
    """Tokens for several requests, as they come: iterate once over it.

    `reasons` says of each request that has ended why: "length" (it has max_new_tokens), "eos" (the model drew one of
    `end_tokens`, which is not part of the text), "stop" (`end` was called) or "context" (the context is full, and
    `slide` is False). With `slide`, the model reads the newer half of a full context again.

    Each request gets the tokens that it gets alone, in any order and with any `batch_size`, but for rounding errors.
    `dtype` is that of the matrix products. Raises ConfigError, at once, for an empty prompt, one that is longer than
    the context, and settings without meaning.
    """

    def __init__(
        self,
        model: Transformer,
        requests: Sequence[Request],
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        end_tokens: Collection[int] = (),
        slide: bool = True,
    ) -> None:
        for request in requests:
            _check(request, model.config.seq_len)
        self.model, self.requests, self.dtype = model, list(requests), dtype
        self.reasons: dict[int, Reason] = {}
        self._context, self._end_tokens, self._slide = model.config.seq_len, frozenset(end_tokens), slide
        self._device = model.token_embedding.weight.device
        self._batch_size = max(1, min(batch_size, len(self.requests)))
        self._waiting = deque(range(len(self.requests)))
        self._rows: list[_Row] = []  # row i of the cache belongs to entry i
        self._stream = self._generated()

    def __iter__(self) -> Iterator[Generated]:
        return self._stream

    def end(self, request: int) -> None:
        """Ends a request: no further token of it comes, and its reason is "stop"."""
        self.reasons[request] = "stop"

    @torch.inference_mode()
    def _generated(self) -> Iterator[Generated]:
        self._cache = StaticCache(self.model, self._batch_size, self.dtype)
        self._sampler = Sampler(self.requests, self._batch_size, self.model.config.vocab_size, self._device)
        self._tokens_B = torch.zeros(self._batch_size, dtype=torch.int64, device=self._device)
        while self._rows or self._waiting:
            self._leave()
            if entering := self._enter():
                drawn = self._prefill(entering)
            elif full := [row for row in self._rows if row.length == self._context]:
                drawn = self._prefill(full)
            elif self._rows:
                drawn = self._step()
            else:
                continue
            yield from self._known(drawn)

    def _leave(self) -> None:
        """Takes away the rows that have ended; the last ones move to their places."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].request in self.reasons:
                last = self._rows.pop()
                if place < len(self._rows):
                    self._rows[place] = last
                    self._cache.move_row(len(self._rows), place)
                    self._sampler.move_row(len(self._rows), place)
                    self._tokens_B[place] = self._tokens_B[len(self._rows)]

    def _enter(self) -> list[_Row]:
        """Gives free rows to waiting requests."""
        entered = []
        while self._waiting and len(self._rows) < self._batch_size:
            number = self._waiting.popleft()
            request = self.requests[number]
            fits = self._context + 1 - len(request.prompt)  # The last token needs no place in the context.
            reason: Reason = "length" if self._slide or request.max_new_tokens <= fits else "context"
            limit = request.max_new_tokens if reason == "length" else fits
            if limit == 0 and number not in self.reasons:
                self.reasons[number] = reason
            if number not in self.reasons:
                self._sampler.enter(len(self._rows), request)
                self._rows.append(_Row(number, limit, reason, list(request.prompt)))
                entered.append(self._rows[-1])
        return entered

    def _prefill(self, rows: list[_Row]) -> _Draw:
        """Reads the text of rows, or the newer half of the context where it is full, and draws their next tokens."""
        half = max(1, self._context // 2)
        texts = [row.text if not row.length else row.text[-half:] for row in rows]
        places = [place for place, row in enumerate(self._rows) if row in rows]
        last_logits: list[Tensor | None] = [None] * len(rows)
        start, longest = 0, max(map(len, texts))
        while start < longest:
            # Rows that have more to read go on together. Causal attention never sees the padding behind a shorter one.
            reading = [number for number, text in enumerate(texts) if len(text) > start]
            stop = min(longest, start + max(PREFILL_POSITIONS, PREFILL_TOKENS // len(reading)))
            parts = [texts[number][start:stop] for number in reading]
            tokens = torch.tensor([part + [0] * (stop - start - len(part)) for part in parts], device=self._device)
            wanted = torch.tensor([len(part) - 1 for part in parts], device=self._device)
            cache = self._cache.rows(torch.tensor([places[number] for number in reading], device=self._device), start)
            with autocast(self._device, self.dtype):
                logits = self.model(tokens, cache, wanted_B=wanted)
            for number, logits_V in zip(reading, logits[:, 0], strict=True):
                last_logits[number] = logits_V
            start = stop
        where = torch.tensor(places, device=self._device)
        self._cache.lengths_B[where] = torch.tensor([len(text) for text in texts], device=self._device)
        for row, text in zip(rows, texts, strict=True):
            row.length = len(text)
        return self._draw(places, torch.stack([each for each in last_logits if each is not None]), where)

    def _step(self) -> _Draw:
        """Reads the last token of every row, and draws the next ones."""
        count, lengths = len(self._rows), [row.length for row in self._rows]
        cache = self._cache.step(count, max(lengths) + 1, equal=min(lengths) == max(lengths))
        with autocast(self._device, self.dtype):
            logits = self.model(self._tokens_B[:count, None], cache)[:, 0]
        for row in self._rows:
            row.length += 1
        return self._draw(range(count), logits, slice(0, count))

    def _draw(self, places: Sequence[int], logits_BV: Tensor, where: slice | Tensor) -> _Draw:
        """Draws the next tokens of the rows at `places`; `where` are the same places, as an index."""
        rows = [self._rows[place] for place in places]
        for place, row in zip(places, rows, strict=True):
            self._sampler.prepare(place, row.drawn)
            row.drawn += 1
        drawn = self._sampler.draw(logits_BV, where)
        self._tokens_B[where] = drawn.tokens_B
        return _Draw(rows, drawn)

    def _known(self, draw: _Draw) -> Iterator[Generated]:
        """Fetches the tokens that were drawn, and tells which requests end with them."""
        tokens = draw.drawn.tokens_B.tolist()
        logprobs, likeliest, theirs = (
            part.tolist() if part is not None else None
            for part in (draw.drawn.logprob_B, draw.drawn.likeliest_BN, draw.drawn.logprob_BN)
        )
        for place, (row, token) in enumerate(zip(draw.rows, tokens, strict=True)):
            if row.request in self.reasons:
                continue
            if token in self._end_tokens:
                self.reasons[row.request] = "eos"
                continue
            row.text.append(token)
            if len(row.text) == len(self.requests[row.request].prompt) + row.limit:
                self.reasons[row.request] = row.reason
            count = self.requests[row.request].logprobs
            if count and logprobs and likeliest and theirs:
                alternatives = list(zip(likeliest[place][:count], theirs[place][:count], strict=True))
                yield Generated(row.request, token, logprobs[place], alternatives)
            else:
                yield Generated(row.request, token)


def _check(request: Request, context: int) -> None:
    request.settings.check()
    if not request.prompt:
        raise ConfigError("the prompt is empty; give it at least one character")
    if len(request.prompt) > context:
        raise ConfigError(
            f"the prompt has {len(request.prompt)} tokens and the model's context {context}; shorten the prompt to fit"
        )


def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    settings: SamplingSettings,
    *,
    seed: int,
    separator: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[int]:
    """Yields at most `max_new_tokens` tokens that follow `prompt`, and ends before a `separator`.

    It is a `Generation` of one request, and raises what that does.
    """
    ends = () if separator is None else (separator,)
    generation = Generation(model, [Request(prompt, max_new_tokens, settings, seed)], dtype=dtype, end_tokens=ends)
    return (each.token for each in generation)
