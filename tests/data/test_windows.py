"""The windows of evaluation: each target once, with as much context as there is, and those of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cda_cli.data import (
    IGNORE,
    Batch,
    ByteTokenizer,
    Encoded,
    JsonTokenizer,
    Tokenizer,
    Tokens,
    Windows,
    count_words,
    document_windows,
    whole_windows,
)
from cda_cli.data.streaming import encode_document
from cda_cli.errors import DataError
from tests.data.tokenizer_kinds import KINDS, byte_level

BYTES = ByteTokenizer()
DOCUMENTS = st.lists(st.text("abc d", max_size=30), min_size=1, max_size=6).filter(any)
# The context, the stride of a window, the rows of a batch.
SIZES = st.integers(1, 12).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T), st.integers(1, 5)))


def marked() -> JsonTokenizer:
    """A tokenizer whose documents begin with one token and end with another."""
    inner = byte_level()
    inner.add_special_tokens(["<s>", "</s>"])
    return JsonTokenizer(inner, "marked", bos="<s>", eos="</s>")


def shared_mark() -> JsonTokenizer:
    """GPT-2's: one token stands before a document and after it."""
    inner = byte_level()
    inner.add_special_tokens(["<|endoftext|>"])
    return JsonTokenizer(inner, "shared", bos="<|endoftext|>", eos="<|endoftext|>")


TOKENIZERS = {"bytes": BYTES, "marked": marked(), "shared": shared_mark()}


def text_of(documents: list[str], tokenizer: Tokenizer = BYTES) -> Tokens:
    encoded = Encoded.join(encode_document(tokenizer, document) for document in documents)
    return Tokens(*encoded, text_bytes=sum(map(len, documents)))


def predictions(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    """What each window sees before its last target, and its targets."""
    found = []
    for inputs, targets in ((*row,) for batch in batches for row in zip(batch.inputs, batch.targets, strict=True)):
        counted = (targets != IGNORE).nonzero().flatten()
        found.append((inputs[: counted[-1] + 1].tolist(), targets[counted].tolist()))
    return found


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(TOKENIZERS)), documents=DOCUMENTS, sizes=SIZES)
def test_documents_are_scored_as_lm_evaluation_harness_does(
    name: str, documents: list[str], sizes: tuple[int, int, int]
) -> None:
    """`loglikelihood_rolling` gives the model each window and scores its last tokens."""
    tokenizer, (context, stride, batch_size) = TOKENIZERS[name], sizes
    prefix = tokenizer.separator if tokenizer.bos is None else tokenizer.bos
    expected = []
    for document in documents:
        ids = tokenizer.encode(document).tolist()
        expected += list(get_rolling_token_windows(ids, prefix, context, context - stride + 1))
    windows = document_windows([text_of(documents, tokenizer)], tokenizer, context, stride)
    assert predictions(list(windows.batches(batch_size))) == [(seen, scored) for seen, scored in expected]
    if stride == context:  # what the class for Hugging Face models does with them
        joined = [(before + scored, scored) for before, scored in map(make_disjoint_window, expected)]
        assert [(seen[:-1], scored) for seen, scored in joined] == expected


@settings(max_examples=100)
@given(count=st.integers(2, 60), sizes=SIZES)
def test_a_whole_text_has_each_token_once_with_the_context_that_fits(count: int, sizes: tuple[int, int, int]) -> None:
    context, stride, batch_size = sizes
    tokens = Tokens(np.arange(count, dtype=np.uint16), np.arange(count) % 3, 0)
    batches = list(whole_windows([tokens], context, stride).batches(batch_size))
    seen = 0
    for inputs, targets in predictions(batches):
        assert targets == list(range(seen + 1, seen + 1 + len(targets)))
        seen += len(targets)
        assert inputs == list(range(max(0, seen - context), seen)), "a window has less context than there is"
        assert len(targets) <= (stride if seen > context else context)
    assert seen == count - 1
    assert sum(int(batch.target_bytes.sum()) for batch in batches) == int(tokens.sizes[1:].sum())


@given(documents=st.lists(DOCUMENTS, min_size=1, max_size=3), sizes=SIZES, skip=st.integers(0, 3))
def test_windows_of_several_texts(documents: list[list[str]], sizes: tuple[int, int, int], skip: int) -> None:
    """They follow each other, none spans two texts, and documents are counted on."""
    context, stride, batch_size = sizes
    texts = [text_of(each) for each in documents]
    windows = document_windows(texts, BYTES, context, stride)
    apart = [document_windows([text], BYTES, context, stride) for text in texts]
    batches = list(windows.batches(batch_size))
    assert predictions(batches) == [one for each in apart for one in predictions(list(each.batches(batch_size)))]
    assert predictions(batches[skip:]) == predictions(list(windows.batches(batch_size, skip)))
    assert np.array_equal(np.unique(windows.document), np.arange(sum(1 for each in documents for one in each if one)))
    assert sum(part.stop - part.start for part in windows.slices(batch_size)) == len(windows)


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 20))
def test_the_first_windows_are_the_beginning(count: int, context: int, most: int) -> None:
    tokens = [Tokens(np.arange(count, dtype=np.uint16), np.ones(count, np.uint8), 0)] * 2
    first, whole = whole_windows(tokens, context, context, most), whole_windows(tokens, context, context)

    def arrays(windows: Windows) -> list[Any]:
        return [windows.text.tolist(), windows.start.tolist(), windows.first.tolist(), windows.end.tolist()]

    assert len(first) == min(most, len(whole))
    if most <= len(whole) // 2:
        assert arrays(first) == arrays(whole.take(slice(most)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_documents_are_those_of_their_text(kind: str) -> None:
    """Each byte of a document counts once, those of a character that is spelled in bytes too, and a mark for none."""
    tokenizer = JsonTokenizer(KINDS[kind](), kind)
    documents = ["The naïve cat 🙂 sat.", "", "日本語 a", "mat"]
    parts = [tokenizer.encode_sized(document) for document in documents]
    windows = document_windows([text_of(documents, tokenizer)], tokenizer, 5, 3)
    counted = torch.cat([batch.target_bytes for batch in windows.batches(4)])
    for number, part in enumerate(part for part in parts if len(part.ids)):
        assert int(counted[torch.from_numpy(windows.document == number)].sum()) == int(part.sizes.sum())
    if kind in ("byte_level", "byte_fallback"):
        assert int(counted.sum()) == len("".join(documents).encode())


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_words_are_what_white_space_separates(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    documents = ["one two\n three ", "   ", "fou", "r five"]
    tokens = text_of(documents, tokenizer)
    windows = document_windows([tokens], tokenizer, 4, 4)
    assert count_words(windows, tokenizer).tolist() == [3, 0, 1, 2]
    assert count_words(windows.take(windows.document < 2), tokenizer).tolist() == [3, 0]
    assert count_words(whole_windows([tokens], 4, 4), tokenizer).tolist() == [6], "a separator ends a word"


def test_a_text_without_a_token_to_predict_is_refused() -> None:
    with pytest.raises(DataError, match="give --data more text"):
        whole_windows([text_of([""])], 4, 4)
    with pytest.raises(DataError, match="no document of the text has a token"):
        document_windows([text_of(["", ""])], BYTES, 4, 4)
