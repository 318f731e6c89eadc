"""documents → batches, without preparing: what `--streaming` trains on.

The documents come in the order of the data, each followed by a separator, packed end to end into windows. Nothing is
shuffled, so a position is small and exact: the document's place in the data, and the token within it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cda_cli.config import DataConfig
from cda_cli.data.batches import Batch, State, check_counts, check_state, to_batch
from cda_cli.data.cache import Preparation
from cda_cli.data.documents import Position
from cda_cli.data.fingerprint import digest
from cda_cli.data.prepare import Tokens
from cda_cli.data.sources import QUIETLY, Source, open_source
from cda_cli.data.split import HashRule
from cda_cli.data.tokenizers import Encoded, Tokenizer, utf8
from cda_cli.errors import DataError
from cda_cli.plurals import counted


@dataclass(frozen=True)
class _Part:
    """A tokenised document, separator included, with the place from which reading yields it next."""

    epoch: int
    position: Position | None
    encoded: Encoded


class StreamedBatches:
    """An endless iterator of (batch, state): the state, small plain JSON, resumes *after* that batch.

    At the end of the data it starts again, with epoch + 1. It passes over the documents that their hash holds out,
    unless the data comes with a validation split. Raises DataError for bad data, for data of a single document (nothing
    would be left to validate on), and for a `state` of other data or another tokenizer.

    Only the `rows` of each batch are made, as those of `TrainBatches` are. `source` is what `config` names, if it is
    open already.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        state: Mapping[str, Any] | None = None,
        rows: slice = slice(None),
        source: Source | None = None,
    ) -> None:
        self._source = source or streamed_source(config)
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._rows = rows
        self._rule = HashRule.of_fraction(config.validation_fraction)
        self._identity = {
            "data": digest(
                self._source.identity, config.model_dump(include={"text_column", "encoding", "validation_fraction"})
            ),
            "tokenizer": tokenizer.fingerprint,
        }
        epoch, position, self._offset = 0, None, 0
        if state is not None:
            check_state(state, self._identity)
            check_counts(state, {"epoch": 2**63, "offset": 2**63})
            epoch, position, self._offset = state["epoch"], state["position"], state["offset"]
        self._parts: deque[_Part] = deque()
        self._buffered = 0
        self._incoming = self._documents(epoch, position)

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        return self

    def __next__(self) -> tuple[Batch, State]:
        count = self._batch_size * self._seq_len
        while self._buffered - self._offset < count + 1:
            part = next(self._incoming)
            self._parts.append(part)
            self._buffered += len(part.encoded.ids)
        # Neighbouring windows share a token: the last target of one is the first input of the next.
        rows, sizes = (
            np.lib.stride_tricks.sliding_window_view(values, self._seq_len + 1)[:: self._seq_len][self._rows]
            for values in self._peek(count + 1)
        )
        self._advance(count)
        return to_batch(rows, sizes), self.state()

    def state(self) -> State:
        """The place at which the next window starts."""
        first = self._parts[0]
        return {"epoch": first.epoch, "position": first.position, "offset": self._offset, **self._identity}

    def _peek(self, count: int) -> Encoded:
        pieces, start = [], self._offset
        for part in self._parts:
            pieces.append(Encoded(*(values[start : start + count] for values in part.encoded)))
            count -= len(pieces[-1].ids)
            start = 0
        return Encoded.join(pieces)

    def _advance(self, count: int) -> None:
        self._offset += count
        while self._offset >= len(self._parts[0].encoded.ids):
            size = len(self._parts.popleft().encoded.ids)
            self._offset -= size
            self._buffered -= size

    def _documents(self, epoch: int, position: Position | None) -> Iterator[_Part]:
        while True:
            whole_pass, tokens = position is None, 0
            for text, after in self._source.training.read(position):
                if self._source.validation is not None or not self._rule.held_out(text):
                    part = _Part(epoch, position, encode_document(self._tokenizer, text))
                    tokens += len(part.encoded.ids)
                    yield part
                position = after
            if whole_pass and tokens <= self._seq_len:
                raise DataError(
                    f"{self._source.description} has {counted(tokens, 'token')} to train on, and seq_len "
                    f"{self._seq_len} takes {self._seq_len + 1}; give --data more text, or leave out --streaming"
                )
            epoch, position = epoch + 1, None


def streamed_validation(
    config: DataConfig, tokenizer: Tokenizer, max_tokens: int, source: Source | None = None
) -> Tokens:
    """The first held-out documents, whole and in memory, until they have at least `max_tokens`.

    `source` is what `config` names, if it is open already. Raises DataError as StreamedBatches does, and if no document
    is held out.
    """
    source = source or streamed_source(config)
    rule = HashRule.of_fraction(config.validation_fraction)
    parts: list[Encoded] = []
    tokens = text_bytes = 0
    for text in source.validation if source.validation is not None else source.training:
        if source.validation is not None or rule.held_out(text):
            parts.append(encode_document(tokenizer, text))
            tokens += len(parts[-1].ids)
            text_bytes += len(utf8(text))
            if tokens >= max_tokens:
                break
    if not parts:
        raise DataError(
            f"no document of {source.description} is held out; raise --set data.validation_fraction, or leave out "
            "--streaming"
        )
    whole = Encoded.join(parts)
    return Tokens(*whole, text_bytes, lost_bytes=text_bytes - int(whole.sizes.sum(dtype=np.int64)))


def encode_document(tokenizer: Tokenizer, text: str) -> Encoded:
    """A document with what stands before it and the separator after it, which stand for no text."""
    return Encoded.join([tokenizer.beginning, tokenizer.encode_sized(text), tokenizer.ending])


def streamed_source(config: DataConfig, preparation: Preparation = QUIETLY) -> Source:
    """The source that `config` names, to be streamed. Raises DataError as StreamedBatches does."""
    source = open_source(config.model_copy(update={"streaming": True}), preparation)
    if source.single:
        raise DataError(
            f"{source.description} is a single document, which cannot be streamed and held out at once; leave out "
            "--streaming"
        )
    return source
