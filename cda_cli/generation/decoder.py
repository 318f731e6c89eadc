"""Reads and draws on the device: prefill of some rows of a batch, and steps of one token for all of them.

Whatever a step changes is on the device, so that a CUDA graph can hold the step.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.generation.requests import Request
from cda_cli.generation.sampling import Drawn, Sampler
from cda_cli.model import (
    KeyReads,
    KeySelection,
    KeyValueCache,
    StaticCache,
    Transformer,
    reading_active_units,
    weights_read,
)
from cda_cli.runtime import autocast, to_device

LEAST_BUCKET = 256  # positions of the shortest context for which a CUDA graph is captured
PREFILL_TOKENS = 16384  # read in one pass, of all rows together, but at least PREFILL_POSITIONS of each
PREFILL_POSITIONS = 256
MOST_BUCKETS = 256  # for which a step is compiled


class _CapturedStep(NamedTuple):
    """A CUDA graph of a step, and where it leaves what it draws."""

    graph: torch.cuda.CUDAGraph
    drawn: Drawn


class Decoder:
    """A model, the cache of a batch of rows, and what draws their tokens. `dtype` is that of the matrix products.

    Steps are `compiled` by torch.compile if that is wanted, which takes some time at first. They read the keys of
    `selection`, or all. Steps of few rows that are not compiled read the weights of units that are not 0 alone, where
    they can (`model.active_units`).
    """

    def __init__(
        self,
        model: Transformer,
        requests: Sequence[Request],
        rows: int,
        dtype: torch.dtype,
        compiled: bool,
        selection: KeySelection | None = None,
    ) -> None:
        self.device = model.token_embedding.weight.device
        most = max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)
        self._dtype, self._rows, self._positions = dtype, rows, min(most, model.config.seq_len)
        # FSDP gathers the weights of a layer for each pass. It has no copy of the model, and a graph would miss it.
        is_sharded = any(type(parameter) is not nn.Parameter for parameter in model.parameters())
        self._model = model if is_sharded else with_matrices(model, dtype)
        if not is_sharded and not compiled:
            self._model = reading_active_units(self._model, rows)
        self._cache = StaticCache(model, rows, dtype, self._positions, selection)
        self._pages = self._cache.pages
        self._sampler = Sampler(requests, rows, model.config.vocab_size, self.device, model.backend)
        self._tokens_B = torch.zeros(rows, dtype=torch.int64, device=self.device)
        # Its own method, kept here, would keep the decoder and its copies of weights alive until a search for garbage.
        self._compiled_logits = _compiled(self._logits_of_step) if compiled else None
        fits_graph = self._pages is None or self._pages.fits_cuda_graph
        self._has_graphs = model.fits_cuda_graph and fits_graph and not is_sharded
        self._needs_buckets = compiled or self.device.type == "cuda"
        self._steps: dict[tuple[int, int], _CapturedStep | None] = {}
        self._graph_pool: Any = None  # The graphs never run at the same time, so they share their memory.

    def enter(self, row: int, request: Request) -> None:
        """Gives a row to a request."""
        self._sampler.enter(row, request)

    def move_row(self, source: int, target: int) -> None:
        """Copies a row into another one."""
        self._cache.move_row(source, target)
        self._sampler.move_row(source, target)
        self._tokens_B[target] = self._tokens_B[source]

    def prefill(self, rows: Sequence[int], texts: Sequence[Sequence[int]], drawn: Sequence[int]) -> Drawn:
        """Reads the text of each of `rows` from its start on, and draws a token after it.

        `drawn` is the number of tokens that were drawn so far for each. A long text is read in several passes.
        """
        last_logits: list[Tensor | None] = [None] * len(rows)
        if self._pages is not None:
            self._pages.begin_prefill()
        start, longest = 0, max(map(len, texts))
        while start < longest:
            # Rows that have more to read go on together. Causal attention never sees the padding behind a shorter one.
            reading = [number for number, text in enumerate(texts) if len(text) > start]
            stop = min(longest, start + max(PREFILL_POSITIONS, PREFILL_TOKENS // len(reading)))
            parts = [list(texts[number][start:stop]) for number in reading]
            tokens = self._tensor([part + [0] * (stop - start - len(part)) for part in parts])
            cache = self._cache.rows(self._tensor([rows[number] for number in reading]), start)
            with autocast(self.device, self._dtype):
                logits = self._model(tokens, cache, wanted_B=self._tensor([len(part) - 1 for part in parts]))
            for number, logits_V in zip(reading, logits[:, 0], strict=True):
                last_logits[number] = logits_V
            start = stop
        where = self._tensor(rows)
        self._cache.lengths_B[where] = self._tensor([len(text) for text in texts])
        self._prepare_draw(rows, drawn)
        return self._draw(torch.stack([each for each in last_logits if each is not None]), where)

    def step(self, lengths: Sequence[int], drawn: Sequence[int]) -> Drawn:
        """Reads the newest token of the first rows, which have `lengths` positions before it, and draws the next ones.

        It may draw for further rows, which come last and mean nothing.
        """
        rows, longest = len(lengths), max(lengths) + 1
        if self._pages is not None:
            self._pages.begin_step(rows)
        self._prepare_draw(range(rows), drawn)
        if self._needs_buckets:
            bucket = _bucket(rows, 1, self._rows), _bucket(longest, LEAST_BUCKET, self._positions)
            return self._replayed(*bucket) if self._has_graphs else self._step(*bucket)
        if min(lengths) == max(lengths):  # Slices of the cache are quicker than lengths in a tensor.
            return self._draw_after(self._read(rows, self._cache.rows(slice(0, rows), lengths[0])))
        self._cache.lengths_B[:rows] = self._tensor(lengths)
        return self._step(rows, longest)

    def reads(self) -> KeyReads | None:
        """What the steps read, if not all keys."""
        return None if self._pages is None else self._pages.reads()

    def weights_read(self) -> float | None:
        """The share of the weights of the feed-forward that the steps read, if not all."""
        return weights_read(self._model)

    def _step(self, rows: int, longest: int) -> Drawn:
        logits_of_step = self._compiled_logits or self._logits_of_step
        return self._draw_after(logits_of_step(rows, longest))

    def _logits_of_step(self, rows: int, longest: int) -> Tensor:
        return self._read(rows, self._cache.step(rows, longest))

    def _read(self, rows: int, cache: KeyValueCache) -> Tensor:
        """Returns the logits [B, 1, V] after the newest tokens of the first rows."""
        with autocast(self.device, self._dtype):
            logits: Tensor = self._model(self._tokens_B[:rows, None], cache)
        return logits

    def _draw_after(self, logits_B1V: Tensor) -> Drawn:
        return self._draw(logits_B1V[:, 0], slice(0, len(logits_B1V)))

    def _replayed(self, rows: int, longest: int) -> Drawn:
        """Does what `_step` does, from the second time on by a CUDA graph, which the host launches as a whole.

        The first time compiles the kernels. A short text captures nothing.
        """
        key = rows, longest
        if key not in self._steps:
            self._steps[key] = None
            return self._step(rows, longest)
        captured = self._steps[key]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as one that prepares batches of training, may use the GPU meanwhile.
            capture = torch.cuda.graph(
                graph, pool=self._graph_pool, stream=_capture_stream(self.device), capture_error_mode="thread_local"
            )
            with torch.cuda.device(self.device), capture:
                drawn = self._step(rows, longest)
            self._graph_pool = graph.pool()
            captured = self._steps[key] = _CapturedStep(graph, drawn)
        captured.graph.replay()
        return captured.drawn

    def _prepare_draw(self, rows: Sequence[int], drawn: Sequence[int]) -> None:
        for row, count in zip(rows, drawn, strict=True):
            self._sampler.prepare(row, count)

    def _draw(self, logits_BV: Tensor, rows: slice | Tensor) -> Drawn:
        drawn = self._sampler.draw(logits_BV, rows)
        self._tokens_B[rows] = drawn.tokens_B
        return drawn

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return to_device(torch.tensor(numbers), self.device)


def _compiled(function: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """Compiles `function` anew for each pair of numbers. By itself, PyTorch runs it uncompiled after eight of them."""
    compiled = torch.compile(function, dynamic=False)

    def run(rows: int, longest: int) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MOST_BUCKETS):
            return compiled(rows, longest)

    return run


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs are captured. That of PyTorch is on the device that was current first."""
    return torch.cuda.Stream(device)


def _bucket(count: int, least: int, most: int) -> int:
    """The smallest of least, 2·least, 4·least, …, most that is no less than `count`."""
    return min(most, least * 2 ** max(0, math.ceil(math.log2(count / least))))


def linear_parameters(model: Transformer) -> list[nn.Parameter]:
    """The weights and biases that `Decoder` has in its dtype."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [parameter for linear in linears for parameter in linear.parameters()]


def with_matrices(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Returns the model with the weights of its linears in `dtype`, so that autocast need not cast them in each pass.

    Those of a learned k and of a gate are packed with those of queries, keys and values. All else is shared with
    `model`.
    """
    if dtype == torch.float32:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    for block in copied.each_block():
        block.attention.pack_projection()
    return copied
