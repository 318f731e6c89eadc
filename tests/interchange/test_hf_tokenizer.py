"""The tokenizer of an exported folder gives a text the ids that it has here, and these ids the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from cda_cli.data import JsonTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from cda_cli.errors import DataError
from cda_cli.interchange.hf_tokenizer import hf_tokenizer
from tests.data.tokenizer_kinds import KINDS, tokenizer_of_kind

BYTES = load_tokenizer("bytes")
EXPORTED = {kind: (tokenizer, hf_tokenizer(tokenizer)) for kind, tokenizer in
            {"bytes": BYTES, **{kind: tokenizer_of_kind(kind) for kind in KINDS}}.items()}  # fmt: skip
SEPARATOR = "<|endoftext|>"
AWKWARD = [
    SEPARATOR,
    f"a{SEPARATOR}\n",
    "",
    " ",
    "ÿ",
    "\xff\x00",
    "naïve  cat\r\n\t",
    "日本語🙂",
    "e\u0301",
    "a" * 40,
    "\u2028x\x85",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(AWKWARD)


@pytest.mark.parametrize("kind", sorted(EXPORTED))
@given(text=TEXTS)
def test_a_text_has_the_same_tokens(kind: str, text: str) -> None:
    """The name of a special token within a text is that token in transformers, unless it is told to split it."""
    tokenizer, exported = EXPORTED[kind]
    expected = tokenizer.encode(text).tolist()
    exported.inner.encode_special_tokens = True
    assert exported.inner.encode(text).ids == expected
    exported.inner.encode_special_tokens = False
    if not any(token.content in text for token in exported.inner.get_added_tokens_decoder().values()):
        assert exported.inner.encode(text).ids == expected


@given(text=TEXTS)
def test_bytes_come_back(text: str) -> None:
    exported = EXPORTED["bytes"][1].inner
    assume(SEPARATOR not in text)
    assert exported.decode(exported.encode(text).ids) == text
    assert exported.encode(text).ids == list(text.encode())


@pytest.mark.parametrize("kind", sorted(EXPORTED))
def test_the_separator_is_a_token_that_no_text_holds_and_that_import_finds(kind: str) -> None:
    tokenizer, exported = EXPORTED[kind]
    assert set(exported.special.values()) == {tokenizer.separator}
    assert exported.inner.get_vocab_size() == tokenizer.vocab_size
    again = tokenizer_from_json(exported.inner.to_str())
    assert (again.separator, again.vocab_size) == (tokenizer.separator, tokenizer.vocab_size)


def test_transformers_adds_no_token(tmp_path: Path) -> None:
    """What has a post-processor here, such as one that puts [CLS] in front, was never trained with it."""
    from tokenizers.processors import TemplateProcessing

    inner = KINDS["word_piece"]()
    inner.post_processor = TemplateProcessing(single="[SEP] $A [SEP]", special_tokens=[("[SEP]", 1)])
    tokenizer: Tokenizer = JsonTokenizer(inner, "with [SEP]")
    exported = hf_tokenizer(tokenizer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=exported.inner, eos_token="[SEP]", bos_token="[SEP]")
    assert fast("the cat")["input_ids"] == tokenizer.encode("the cat").tolist()


def test_a_separator_that_has_no_place_is_refused() -> None:
    """The ids of this vocabulary leave a gap, which the library fills first."""
    import tokenizers
    from tokenizers import models

    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "cat": 7}, unk_token="<unk>"))
    with pytest.raises(DataError, match="no token of gaps can have the id 8 of its separator"):
        hf_tokenizer(JsonTokenizer(made, "gaps"))
