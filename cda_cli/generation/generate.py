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

from cda_cli.errors import ConfigError
from cda_cli.generation.decoder import Decoder
from cda_cli.generation.requests import Generated, Request, SamplingSettings
from cda_cli.generation.sampling import Drawn
from cda_cli.model import KeyReads, KeySelection, Transformer

Reason = Literal["length", "eos", "stop", "context"]

ON_THE_WAY = 2  # passes whose tokens a GPU still computes or sends while the next pass is launched


@dataclass(eq=False)
class _Row:
    """A request in a row of the batch."""

    request: int
    limit: int  # tokens that it may get
    reason: Reason  # why it ends then
    text: list[int]  # the prompt and the tokens that are known
    drawn: int = 0  # tokens that were drawn, on the device
    length: int = 0  # positions in the cache


class _Pass(NamedTuple):
    """What was drawn in one pass, for which rows. From a GPU it is on its way to the host until `arrived`."""

    rows: list[_Row]
    drawn: Drawn
    arrived: torch.cuda.Event | None


class Generation:
    """Tokens for several requests, as they come: iterate once over it.

    `reasons` says of each request that has ended why: "length" (it has max_new_tokens), "eos" (the model drew one of
    `end_tokens`, which is not part of the text), "stop" (`end` was called) or "context" (the context is full, and
    `slide` is False). With `slide`, the model reads the newer half of a full context again.

    Each request gets the tokens that it gets alone, in any order and with any `batch_size`, but for rounding errors.
    `dtype` is that of the matrix products. On a GPU a step is a CUDA graph. `compiled` makes torch.compile compile the
    step, which takes up to a minute at first. A step reads the keys of `selection`, or all; where their number depends
    on the keys, it is no CUDA graph. Raises ConfigError, at once, for an empty prompt, one that is longer than the
    context, settings without meaning, and a selection whose loss the attention of the model does not bound.
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
        compiled: bool = False,
        selection: KeySelection | None = None,
    ) -> None:
        if selection is not None:
            _check_selection(model)
        for request in requests:
            _check(request, model.config.seq_len)
        self.model, self.requests, self.dtype = model, list(requests), dtype
        self.reasons: dict[int, Reason] = {}
        self._context, self._end_tokens, self._slide = model.config.seq_len, frozenset(end_tokens), slide
        self._compiled, self._selection = compiled, selection
        self._batch_size = max(1, min(batch_size, len(self.requests)))
        self._waiting = deque(range(len(self.requests)))
        self._rows: list[_Row] = []  # row i of the cache belongs to entry i
        self._on_gpu = model.token_embedding.weight.is_cuda
        self._stream = self._generated()

    def __iter__(self) -> Iterator[Generated]:
        return self._stream

    def reads(self) -> KeyReads | None:
        """What the steps so far read, once there was a token, if not all keys."""
        return self._decoder.reads()

    def weights_read(self) -> float | None:
        """The share of the weights of the feed-forward that the steps so far read, if not all."""
        return self._decoder.weights_read()

    def end(self, request: int) -> None:
        """Ends a request: no further token of it comes, and its reason is "stop"."""
        self.reasons[request] = "stop"

    def _generated(self) -> Iterator[Generated]:
        with torch.inference_mode():
            self._decoder = Decoder(
                self.model, self.requests, self._batch_size, self.dtype, self._compiled, self._selection
            )
        on_the_way: deque[_Pass] = deque()
        while self._rows or self._waiting or on_the_way:
            newest = self._next_pass(all_known=not on_the_way)
            if newest:
                on_the_way.append(newest)
            while on_the_way and (newest is None or len(on_the_way) > (ON_THE_WAY if self._on_gpu else 0)):
                yield from self._known(on_the_way.popleft())

    @torch.inference_mode()  # not around the generator, which would leave and enter this mode with each token
    def _next_pass(self, all_known: bool) -> _Pass | None:
        """Launches a pass for all rows, or for those that enter or are full. There may be none before all is known."""
        self._leave()
        has_room = bool(self._waiting) and len(self._rows) < self._batch_size
        full = [row for row in self._rows if row.length == self._context]
        if not all_known and (has_room or full):
            return None  # No token should wait for a prefill, which takes long, and full rows are read again.
        if entering := self._enter():
            return self._prefill(entering)
        if full:
            return self._prefill(full)
        return self._step() if self._rows else None

    def _leave(self) -> None:
        """Takes away the rows that have ended; the last ones move to their places."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].request in self.reasons or self._rows[place].drawn == self._rows[place].limit:
                last = self._rows.pop()
                if place < len(self._rows):
                    self._rows[place] = last
                    self._decoder.move_row(len(self._rows), place)

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
                self._decoder.enter(len(self._rows), request)
                self._rows.append(_Row(number, limit, reason, list(request.prompt)))
                entered.append(self._rows[-1])
        return entered

    def _prefill(self, rows: list[_Row]) -> _Pass:
        """Reads the text of rows, or the newer half of the context where it is full, and draws their next tokens."""
        half = max(1, self._context // 2)
        texts = [row.text if not row.length else row.text[-half:] for row in rows]
        places = [place for place, row in enumerate(self._rows) if row in rows]
        drawn = self._decoder.prefill(places, texts, [row.drawn for row in rows])
        for row, text in zip(rows, texts, strict=True):
            row.length = len(text)
        return self._sent(rows, drawn)

    def _step(self) -> _Pass:
        """Reads the last token of every row, and draws the next ones."""
        rows = list(self._rows)
        drawn = self._decoder.step([row.length for row in rows], [row.drawn for row in rows])
        for row in rows:
            row.length += 1
        return self._sent(rows, drawn)

    def _sent(self, rows: list[_Row], drawn: Drawn) -> _Pass:
        """Sends what was drawn to the host, without waiting for it."""
        for row in rows:
            row.drawn += 1
        if not self._on_gpu:
            return _Pass(rows, drawn, None)
        on_host = Drawn._make(part.to("cpu", non_blocking=True) if part is not None else None for part in drawn)
        # PyTorch records an event on the current device, which need not be that of the model.
        arrived = torch.cuda.current_stream(drawn.tokens_B.device).record_event()
        return _Pass(rows, on_host, arrived)

    def _known(self, of: _Pass) -> Iterator[Generated]:
        """Fetches the tokens that were drawn, and tells which requests end with them."""
        if of.arrived is not None:
            of.arrived.synchronize()
        tokens = of.drawn.tokens_B.tolist()
        logprobs, likeliest, theirs = (
            part.tolist() if part is not None else None
            for part in (of.drawn.logprob_B, of.drawn.likeliest_BN, of.drawn.logprob_BN)
        )
        for place, (row, token) in enumerate(zip(of.rows, tokens, strict=False)):  # A graph may have further rows.
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


def _check_selection(model: Transformer) -> None:
    if not model.attention_rule.has_threshold:
        raise ConfigError(
            f"--max-keys knows what it leaves out for softmax, and for the soft top-k of the exact solver, but not for "
            f"{model.attention_description}; leave it out"
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
