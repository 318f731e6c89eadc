"""documents → batches, without preparing: what `--streaming` trains on.

The documents come in the order of the data, each followed by a separator, packed end to end into windows. Nothing is
shuffled, so a position is small and exact: the document's place in the data, and the token within it.

Of several processes the first alone reads. It cuts the text into blocks, of which each process tokenises a part, and
all get the tokens of all, which are few bytes. So each has the windows that a single process has, in their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from cda_cli.config import DataConfig
from cda_cli.data.batches import Batch, State, check_counts, check_state, to_batch
from cda_cli.data.cache import Preparation
from cda_cli.data.documents import Position
from cda_cli.data.fingerprint import digest
from cda_cli.data.prefetch import Prefetched
from cda_cli.data.prepare import Tokens
from cda_cli.data.sources import QUIETLY, Source, open_source
from cda_cli.data.split import HashRule
from cda_cli.data.tokenizers import PIECE_CHARACTERS, Encoded, Tokenizer, split_pieces, utf8
from cda_cli.errors import CdaError, DataError
from cda_cli.plurals import counted

TOKEN_CHARACTERS = 8  # more than a token of text has in the mean


class Workers(Protocol):
    """The `count` processes that make a stream into tokens, as one of them sees them; the `first` one reads it."""

    count: int
    first: bool

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Returns the value for this process of those that the first one gives. It waits for the first process."""

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes. It waits for all."""


class _Place(NamedTuple):
    """The place from which reading yields a document next."""

    epoch: int
    position: Position | None


class _Piece(NamedTuple):
    """A piece of a document, with the place of the document that begins with it."""

    text: str
    begins: _Place | None
    ends: bool


@dataclass(frozen=True)
class _Block:
    """Pieces in their order. If a pass ends with them, `whole_pass` says whether it was read from its start."""

    pieces: list[_Piece]
    whole_pass: bool | None = None

    def cut(self, count: int) -> list[_Block]:
        """Cuts it into blocks of about as many characters each."""
        lengths = [len(piece.text) for piece in self.pieces]
        numbers = (np.cumsum([0, *lengths[:-1]]) * count // max(sum(lengths), 1)).tolist()
        cut: list[list[_Piece]] = [[] for _ in range(count)]
        for piece, number in zip(self.pieces, numbers, strict=False):
            cut[number].append(piece)
        return [*map(_Block, cut[:-1]), _Block(cut[-1], self.whole_pass)]


class _Part(NamedTuple):
    """The tokens of a block, and the documents that begin there: the number of tokens before each, and its place."""

    encoded: Encoded
    begins: list[tuple[int, _Place]]
    whole_pass: bool | None


class StreamedBatches:
    """An endless iterator of (batch, state): the state, small plain JSON, resumes *after* that batch.

    At the end of the data it starts again, with epoch + 1. It passes over the documents that their hash holds out,
    unless the data comes with a validation split. Raises DataError for bad data, for data of a single document (nothing
    would be left to validate on), and for a `state` of other data or another tokenizer.

    Only the `rows` of each batch are made, as those of `TrainBatches` are. `source` is what `config` names, if it is
    open already. With several `workers`, only the first reads it; all ask for the same number of batches, so many
    `at_once`.
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
        workers: Workers | None = None,
        at_once: int = 1,
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
        place, self._offset = _Place(0, None), 0
        if state is not None:
            check_state(state, self._identity)
            check_counts(state, {"epoch": 2**63, "offset": 2**63})
            place, self._offset = _Place(state["epoch"], state["position"]), state["offset"]
        # All of these count tokens from the start of the first document that is read.
        self._begins: deque[tuple[int, _Place]] = deque()
        self._parts: deque[Encoded] = deque()
        self._parts_start = self._parts_end = 0
        self._pass_start = 0
        if workers is None or workers.count == 1:
            self._incoming: Iterator[_Part] = map(self._encode, self._blocks(place, PIECE_CHARACTERS))
        else:
            most = max(workers.count * PIECE_CHARACTERS, at_once * batch_size * seq_len * TOKEN_CHARACTERS)
            self._incoming = self._shared(workers, self._blocks(place, most))

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        return self

    def __next__(self) -> tuple[Batch, State]:
        count = self._batch_size * self._seq_len
        while self._parts_end - self._offset < count + 1:
            self._receive()
        # Neighbouring windows share a token: the last target of one is the first input of the next.
        rows, sizes = (
            np.lib.stride_tricks.sliding_window_view(values, self._seq_len + 1)[:: self._seq_len][self._rows]
            for values in self._peek(count + 1)
        )
        self._advance(count)
        return to_batch(rows, sizes), self.state()

    def state(self) -> State:
        """The place at which the next window starts."""
        start, place = self._begins[0]
        return {**place._asdict(), "offset": self._offset - start, **self._identity}

    def _peek(self, count: int) -> Encoded:
        start, end = self._offset - self._parts_start, self._offset - self._parts_start + count
        pieces = []
        for part in self._parts:
            pieces.append(Encoded(*(values[max(start, 0) : max(end, 0)] for values in part)))
            start, end = start - len(part.ids), end - len(part.ids)
        return Encoded.join(pieces)

    def _advance(self, count: int) -> None:
        self._offset += count
        while len(self._begins) > 1 and self._begins[1][0] <= self._offset:
            self._begins.popleft()
        while self._parts_start + len(self._parts[0].ids) <= self._offset:
            self._parts_start += len(self._parts.popleft().ids)

    def _receive(self) -> None:
        part = next(self._incoming)
        self._begins.extend((self._parts_end + start, place) for start, place in part.begins)
        self._parts.append(part.encoded)
        self._parts_end += len(part.encoded.ids)
        if part.whole_pass is not None:
            tokens, self._pass_start = self._parts_end - self._pass_start, self._parts_end
            if part.whole_pass and tokens <= self._seq_len:
                raise DataError(
                    f"{self._source.description} has {counted(tokens, 'token')} to train on, and seq_len "
                    f"{self._seq_len} takes {self._seq_len + 1}; give --data more text, or leave out --streaming"
                )

    def _shared(self, workers: Workers, blocks: Iterator[_Block]) -> Iterator[_Part]:
        """The parts of all workers. While the caller uses those of a block, a thread tokenises of the next one.

        The workers exchange while the caller waits, since each waits for all others in other exchanges too, and these
        must come in the same order.
        """
        ahead = Prefetched(_cut(blocks, workers.count), 1) if workers.first else None
        thread = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        coming: deque[Future[_Part] | CdaError] = deque()
        while True:
            here = workers.scatter(next(ahead) if ahead else None)
            coming.append(here if isinstance(here, CdaError) else thread.submit(self._encode, here))
            if len(coming) > 1:
                part = coming.popleft()
                if isinstance(part, CdaError):
                    raise part
                yield from workers.gather(part.result())

    def _encode(self, block: _Block) -> _Part:
        parts: list[Encoded] = [Encoded(np.empty(0, self._tokenizer.dtype), np.empty(0, self._tokenizer.size_dtype))]
        begins, tokens = [], 0
        encoded = self._tokenizer.encode_batch([piece.text for piece in block.pieces])
        for piece, found in zip(block.pieces, encoded, strict=True):
            if piece.begins:
                begins.append((tokens, piece.begins))
                parts.append(self._tokenizer.beginning)
                tokens += len(parts[-1].ids)
            parts.append(found)
            tokens += len(found.ids)
            if piece.ends:
                parts.append(self._tokenizer.ending)
                tokens += len(parts[-1].ids)
        return _Part(Encoded.join(parts), begins, block.whole_pass)

    def _blocks(self, place: _Place, characters: int) -> Iterator[_Block]:
        """The documents that are not held out, in blocks of at least so many characters, but for the last of a pass."""
        waiting: list[_Piece] = []
        missing = characters
        try:
            while True:
                for text, here in self._documents(place):
                    pieces = list(split_pieces(text))
                    for number, piece in enumerate(pieces, 1):
                        waiting.append(_Piece(piece, here if number == 1 else None, ends=number == len(pieces)))
                        missing -= len(piece)
                        if missing <= 0:
                            yield _Block(waiting)
                            waiting, missing = [], characters
                yield _Block(waiting, whole_pass=place.position is None)
                waiting, missing = [], characters
                place = _Place(place.epoch + 1, None)
        except CdaError:
            yield _Block(waiting)  # The documents before the bad one are good.
            raise

    def _documents(self, place: _Place) -> Iterator[tuple[str, _Place]]:
        """The documents of the rest of a pass that are not held out, each with its place."""
        for text, after in self._source.training.read(place.position):
            if self._source.validation is not None or not self._rule.held_out(text):
                yield text, place
            place = _Place(place.epoch, after)


def _cut(blocks: Iterator[_Block], count: int) -> Iterator[Sequence[_Block | CdaError]]:
    """Each block in `count` parts. What ends the reading comes in its turn, for all."""
    try:
        for block in blocks:
            yield block.cut(count)
    except CdaError as error:
        while True:
            yield [error] * count


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
