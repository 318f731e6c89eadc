"""tokens → the windows in which a text is evaluated. N tokens of a text, W windows, T context, B batch_size.

The first window of a text has up to T targets. Each later window has `stride` more of them, which it sees with as much
of the text before them as the context holds. So each target counts exactly once. With a stride of T windows are
disjoint, except that the last one reaches back until it is full. A text is the whole of a split, whose very first token
is no target, or with `per_document` a document, before which stands a token that begins it. These are the windows of
`get_rolling_token_windows` of lm-evaluation-harness, whose context_len is T − stride + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cda_cli.data.batches import Batch, to_batch
from cda_cli.data.prepare import Tokens
from cda_cli.data.tokenizers import Tokenizer
from cda_cli.errors import DataError
from cda_cli.plurals import counted

Integers = NDArray[np.int64]
PART = 1 << 24  # tokens that are looked through at once


@dataclass(frozen=True)
class Windows:
    """W windows of `texts`, in order. All arrays are int64 [W].

    Window i is of `texts[text[i]]` and of document `document[i]`, which is counted through all texts. Its inputs are
    the tokens [start, end − 1) and its targets that count are [first, end). Where `start` is −1 or the place of a token
    that is before the document, that input is `prefix`, if there is one.
    """

    texts: Sequence[Tokens]
    text: Integers
    document: Integers
    start: Integers
    first: Integers
    end: Integers
    begin: Integers  # the first target of the document
    prefix: int | None = None

    def __len__(self) -> int:
        return len(self.start)

    def take(self, chosen: slice | NDArray[np.bool_]) -> Windows:
        """Some of the windows, in the same order."""
        arrays = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("texts", "prefix")}
        return replace(self, **{name: array[chosen] for name, array in arrays.items()})

    def batches(self, batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of B windows in order, but for the first `skip`. None has windows of two texts.

        Rows of unequal length are filled up on the right, where no target before can see it.
        """
        for chosen in self.slices(batch_size)[skip:]:
            yield self.take(chosen)._batch()

    def target_counts(self) -> Integers:
        """The number of targets of each window, [W]."""
        return np.array([len(sizes) for sizes in self._target_sizes()], np.int64)

    def target_bytes(self) -> Integers:
        """The bytes of text that the targets of each window stand for, [W]."""
        return np.array([sizes.sum(dtype=np.int64) for sizes in self._target_sizes()], np.int64)

    def _target_sizes(self) -> Iterator[NDArray[Any]]:
        """The bytes of text of each target, of one window after another."""
        for text, first, end in zip(self.text, self.first, self.end, strict=True):
            tokens, span = self.texts[text], slice(first, end)
            yield tokens.sizes[span] if tokens.is_target is None else tokens.sizes[span][tokens.is_target[span]]

    def slices(self, batch_size: int) -> list[slice]:
        """Which windows are in each batch."""
        edges = np.searchsorted(self.text, np.arange(len(self.texts) + 1)).tolist()
        return [
            slice(start, min(start + batch_size, edge))
            for begin, edge in itertools.pairwise(edges)
            for start in range(begin, edge, batch_size)
        ]

    def _batch(self) -> Batch:
        tokens = self.texts[self.text[0]]
        start, first, end = (each[:, None] for each in (self.start, self.first, self.end))
        places = start + np.arange((end - start).max())
        inside = places.clip(0, len(tokens) - 1)
        rows: NDArray[Any] = tokens.ids[inside].astype(np.int64)
        if self.prefix is not None:
            rows[self.start < self.begin, 0] = self.prefix
        counts = (places >= first) & (places < end)
        counts = counts if tokens.is_target is None else counts & tokens.is_target[inside]
        return to_batch(rows, tokens.sizes[inside], counts[:, 1:])


def whole_windows(texts: Sequence[Tokens], context: int, stride: int, most: int | None = None) -> Windows:
    """The windows of each text as a whole, of which only the first token is no target; or the first `most` windows.

    A text that is shorter than a window is one shorter window. Raises DataError for a text without a token to predict
    from another.
    """
    for tokens in texts:
        if len(tokens) < 2:
            raise DataError(
                f"the text has {counted(len(tokens), 'token')}, and takes 2 at least, one to predict from the other; "
                "give --data more text"
            )
    longest = max(map(len, texts)) if most is None else 1 + context + (most - 1) * stride
    edges = [(np.array([1]), np.array([min(len(tokens), longest)])) for tokens in texts]
    return _rolling(texts, edges, context, stride, None).take(slice(most))


def document_windows(texts: Sequence[Tokens], tokenizer: Tokenizer, context: int, stride: int) -> Windows:
    """The windows of each document by itself, behind the token that begins a document, or else behind the separator.

    The separator after a document is no target. Raises DataError if no document has a token.
    """
    edges = [_documents(tokens, tokenizer) for tokens in texts]
    if not any(len(begins) for begins, _ in edges):
        raise DataError("no document of the text has a token; give --data more text")
    return _rolling(texts, edges, context, stride, tokenizer.prefix)


def _documents(tokens: Tokens, tokenizer: Tokenizer) -> tuple[Integers, Integers]:
    """The first token of each document that has one, and the place after its last one."""
    parts = range(0, len(tokens), PART)  # The file may be larger than the memory.
    found = (start + np.flatnonzero(tokens.ids[start : start + PART] == tokenizer.separator) for start in parts)
    separators = np.concatenate([np.empty(0, np.int64), *found])
    begins, ends = np.append(0, separators + 1), np.append(separators, len(tokens))
    if tokenizer.bos is not None:
        within = begins < len(tokens)
        begins = begins + (within & (tokens.ids[np.where(within, begins, 0)] == tokenizer.bos))
    return begins[begins < ends], ends[begins < ends]


def _rolling(
    texts: Sequence[Tokens],
    edges: Sequence[tuple[Integers, Integers]],
    context: int,
    stride: int,
    prefix: int | None,
) -> Windows:
    """Windows over the targets [begin, end) of each document, given by its `edges` in each of `texts`."""
    begins, ends = (np.concatenate(parts) for parts in zip(*edges, strict=True))
    text_of = np.repeat(np.arange(len(texts)), [len(parts[0]) for parts in edges])
    counts = 1 + -(-np.maximum(0, ends - begins - context) // stride)
    document = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a window in its document
    begin = begins[document]
    first = np.where(number == 0, begin, begin + context + (number - 1) * stride)
    end = np.minimum(np.where(number == 0, begin + context, first + stride), ends[document])
    start = np.maximum(begin - 1, end - 1 - context)
    return Windows(texts, text_of[document], document, start, first, end, begin, prefix)


def evaluation_batches(
    tokens: Tokens, seq_len: int, batch_size: int, max_batches: int | None = None
) -> Iterator[Batch]:
    """A whole text in order, or its first `max_batches`, in disjoint windows. The last batch may be smaller.

    Raises DataError at once, as `whole_windows` does.
    """
    most = None if max_batches is None else max_batches * batch_size
    return whole_windows([tokens], seq_len, seq_len, most).batches(batch_size)


def count_words(windows: Windows, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Counts the words in the targets of each document, [D]: what white space separates, as lm-evaluation-harness does.

    The documents are those of `windows`, counted from the first one that these hold.
    """
    starts = np.flatnonzero(np.diff(windows.document, prepend=-1))
    last = np.append(starts[1:], len(windows)) - 1
    spans = zip(windows.text[starts], windows.first[starts], windows.end[last], strict=True)
    return np.array([_words(windows.texts[text].targets(first, end), tokenizer) for text, first, end in spans])


def _words(ids: NDArray[Any], tokenizer: Tokenizer) -> int:
    between = np.flatnonzero(ids == tokenizer.separator)
    return sum(len(tokenizer.decode(part).split()) for part in np.split(ids, between))
