"""text → tokens → text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from cda_cli.data import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from cda_cli.data.tokenizers import PIECE_CHARACTERS, STREAM_CONTEXT, split_pieces
from cda_cli.errors import DataError
from tests.data.samples import LETTERS, UNICODE
from tests.data.tokenizer_kinds import KINDS, tokenizer_of_kind

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe(bpe_file: Path) -> Tokenizer:
    return load_tokenizer(str(bpe_file))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer without any of the known separators, whose decoder drops a leading space."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator(LETTERS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "metaspace.json"
    inner.save(str(path))
    return load_tokenizer(str(path))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@given(TEXT)
def test_bytes_give_the_text_back_and_never_hold_the_separator(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.separator]) == text


@given(text=TEXT)
def test_bpe_gives_the_text_back(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert ids.dtype == np.uint16
    assert bpe.decode(ids) == text


def test_bpe_neither_truncates_nor_pads_nor_adds_nor_reads_special_tokens(bpe: Tokenizer) -> None:
    text = LETTERS[0] + "<|endoftext|>" + LETTERS[1]
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.separator not in bpe.encode(text)
    assert bpe.decode([*bpe.encode("a"), bpe.separator, *bpe.encode("b")]) == "ab"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_no_text_becomes_the_separator(kind: str, special: bool, normalized: bool) -> None:
    """A document would end in its middle, whether the vocabulary spells the separator or text is searched for it."""
    spelled = ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"]
    vocabulary = {"<unk>": 0, **{token: 1 + number for number, token in enumerate(spelled)}}
    inner = [KINDS[kind](), tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))][kind == "word_level"]
    inner.add_tokens([tokenizers.AddedToken(token, special=special, normalized=normalized) for token in spelled])
    tokenizer = JsonTokenizer(inner, kind)
    ways = [way for token in spelled for way in (token, token.upper(), token.lower(), f"a{token}b", f" {token}\n")]
    for text in [*ways, " ".join(ways), "".join(spelled)]:
        assert tokenizer.separator not in tokenizer.encode(text), text
    if kind == "byte_level":
        assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in ways)
        assert (tokenizer.separator < inner.get_vocab_size()) is special, "a separator that no text spells is taken"


def test_a_pair_that_becomes_the_separator_is_seen() -> None:
    vocabulary = {letter: number for number, letter in enumerate("</s>")} | {"</": 4, "s>": 5, "</s>": 6}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    inner.add_special_tokens(["</s>"])
    tokenizer = JsonTokenizer(inner, "pairs")
    assert tokenizer.separator == 7
    assert tokenizer.decode(tokenizer.encode("</s>")) == "</s>"


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_token_counts_the_bytes_that_it_stands_for(kind: str) -> None:
    """Together never more than there are; exactly those of its string, where a tokenizer loses nothing."""
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizer_of_kind(kind)

    @given(st.one_of(TEXT, st.text("aé日🙂ﬁ\u0301 \n")))
    def check(text: str) -> None:
        ids, sizes = tokenizer.encode_sized(text)
        assert len(ids) == len(sizes)
        assert sizes.dtype == tokenizer.size_dtype
        total = int(sizes.sum(dtype=np.int64))
        assert total <= len(text.encode())
        if kind in ("bytes", "byte_level", "byte_fallback"):
            assert total == len(text.encode())
        if kind in ("bytes", "byte_level"):
            assert sizes.tolist() == [len(spelled) for spelled in spellings(tokenizer, ids.tolist())]

    check()


def spellings(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Each token with a character a byte, as byte-level vocabularies have them."""
    if isinstance(tokenizer, ByteTokenizer):
        return [chr(token) for token in ids]
    vocabulary = json.loads(tokenizer.to_json() or "")["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    return [names[token] for token in ids]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("metaspace", "the 日 cat", [0, 1, 1, 1, 1, 0, 1, 1, 1, 1]),  # ▁ t h e ▁ <unk> ▁ c a t
        ("byte_fallback", " x", [0, 1, 1]),  # ▁ ▁ x
        ("byte_fallback", "日", [0, 1, 1, 1]),
        ("unigram", "ﬁ THE Ａ", [1, 1, 1, 4, 1, 3]),  # ▁ f i ▁the ▁ a: the first three share ﬁ
        ("word_piece", "Naïve 日 x", [1, 1, 2, 1, 1, 0, 1]),  # n ##a ##i ##v ##e [UNK] x: no token for the spaces
        ("word_level", "the cat sat.", [3, 3, 0, 1]),
        ("word_ends", "caté QQ", [1, 1, 1, 2]),  # Q is dropped
    ],
)
def test_bytes_of_normalised_and_unknown_text(kind: str, text: str, expected: list[int]) -> None:
    assert tokenizer_of_kind(kind).encode_sized(text).sizes.tolist() == expected


def test_offsets_that_a_post_processor_trims_do_not_matter() -> None:
    """RoBERTa's leaves the space out of the offsets of a word."""
    inner = KINDS["byte_level"]()
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = JsonTokenizer(inner, "trimmed")
    assert tokenizer.encode_sized("a  b").sizes.sum() == 4
    assert json.loads(tokenizer.to_json())["post_processor"]["type"] == "ByteLevel", "the file lost it"


def test_a_text_that_cannot_be_encoded_is_one_sentence() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    tokenizer = JsonTokenizer(inner, "words.json")
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(DataError, match=r"^the tokenizer words\.json cannot encode the text \(.*\); give it a token"):
        tokenizer.encode("b")


def test_a_byte_order_mark_is_no_part_of_a_tokenizer_file(folder: Path, bpe: Tokenizer) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes((bpe.to_json() or "").encode("utf-8-sig"))
    assert load_tokenizer(str(path)).fingerprint == bpe.fingerprint
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes((bpe.to_json() or "").encode(encoding))
        with pytest.raises(DataError, match=r"; give --tokenizer another tokenizer\.json$"):
            load_tokenizer(str(path))


def test_a_vocabulary_without_a_separator_grows_by_one(metaspace: Tokenizer, bpe: Tokenizer) -> None:
    assert bpe.separator == 0
    assert metaspace.separator == metaspace.vocab_size - 1
    assert metaspace.decode([*metaspace.encode("document a"), metaspace.separator]) == "document a"


def test_a_lone_surrogate_does_not_stop_anything(bpe: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_stream_says_what_decode_says_for_any_tokens(kind: str) -> None:
    """Over more tokens than a stream looks back."""
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizer_of_kind(kind)

    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=3 * STREAM_CONTEXT))
    def check(ids: list[int]) -> None:
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_stream_goes_on_from_the_prompt(kind: str) -> None:
    """The first new token is not the beginning of the text: its space, or its place in a word, is that after the
    prompt."""
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizer_of_kind(kind)

    @given(prompt=TEXT, text=TEXT)
    @example(prompt="the cat", text="the cat")
    def check(prompt: str, text: str) -> None:
        before, after = (tokenizer.encode(part).tolist() for part in (prompt, text))
        decoder = tokenizer.stream(before)
        new = "".join([*map(decoder.push, after), decoder.flush()])
        assert tokenizer.decode(before) + new == tokenizer.decode([*before, *after])

    check()


@given(text=TEXT)
def test_a_stream_never_emits_a_broken_character(bpe: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    for tokenizer in (ByteTokenizer(), bpe):
        parts = streamed(tokenizer, tokenizer.encode(text).tolist())
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)


def test_a_stream_keeps_the_spaces_between_words(metaspace: Tokenizer) -> None:
    ids = metaspace.encode("document a document b").tolist()
    parts = streamed(metaspace, ids)
    assert "".join(parts) == metaspace.decode(ids) == "document a document b"
    assert sum(map(bool, parts)) > 3, "the text came in one lump"


@given(st.integers(0, 3), st.sampled_from([" ", "\n", "é", "word and ", "line\r\n"]))
def test_pieces_are_short_and_join_to_the_text(extra: int, unit: str) -> None:
    text = unit * (2 * PIECE_CHARACTERS // len(unit) + extra)
    pieces = list(split_pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= PIECE_CHARACTERS for piece in pieces)


def test_a_long_text_is_encoded_whole(bpe: Tokenizer) -> None:
    text = UNICODE * 5000
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_to_json_restores_the_tokenizer(bpe: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        again = tokenizer_from_json(tokenizer.to_json())
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)
        assert again.encode(UNICODE).tolist() == tokenizer.encode(UNICODE).tolist()


def test_the_dtype_holds_every_id() -> None:
    vocabulary = {f"w{index}": index for index in range(1 << 16)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer = JsonTokenizer(inner, "large")
    assert tokenizer.vocab_size == (1 << 16) + 1, "no separator is known, so one is added"
    assert tokenizer.dtype == np.uint32


@pytest.mark.parametrize("content", ["", "not json", "{}", '{"model": 1}'])
def test_a_bad_tokenizer_file_is_one_sentence(folder: Path, content: str) -> None:
    path = folder / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"^tokenizer\.json is not a tokenizer .*; give --tokenizer"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("spec", ["missing.json", "/no/such/file", "a b", "x" * 300])
def test_a_missing_tokenizer_file_is_one_sentence(spec: str) -> None:
    with pytest.raises(DataError, match=r"^there is no tokenizer file .*; give --tokenizer"):
        load_tokenizer(spec)


def test_a_tokenizer_of_the_hub_without_network_is_one_sentence(offline: None) -> None:
    with pytest.raises(DataError, match=r"^the Hugging Face hub is out of reach and .*; connect to the network, or"):
        load_tokenizer("no-such-owner/no-such-tokenizer")


def test_a_document_begins_and_ends_with_the_tokens_that_are_named(marked_file: Path) -> None:
    plain = load_tokenizer(str(marked_file))
    marked = load_tokenizer(str(marked_file), bos="<|im_start|>", eos="<|im_end|>")
    assert (plain.bos, plain.separator, list(plain.beginning.ids)) == (None, 0, [])
    assert (marked.bos, marked.separator) == (1, 2)
    assert list(marked.beginning.ids) == [1]
    assert list(marked.ending.ids) == [2]
    assert list(marked.beginning.sizes) == [0]
    assert marked.decode([1, *marked.encode("a"), 2]) == "a"
    assert "".join(streamed(marked, [1, *map(int, marked.encode("a")), 2])) == "a"
    assert not {0, 1, 2} & {*marked.encode("<|im_start|> and <|im_end|>")}, "a text spells a special token"
    assert len({plain.fingerprint, marked.fingerprint}) == 2, "the cache would take one for the other"
    again = tokenizer_from_json(marked.to_json(), bos="<|im_start|>", eos="<|im_end|>")
    assert again.fingerprint == marked.fingerprint


def test_bytes_have_no_token_that_begins_a_document() -> None:
    with pytest.raises(DataError, match=r"data\.bos"):
        load_tokenizer("bytes", bos="<s>")


@pytest.mark.parametrize("named", [{"bos": "<s>"}, {"eos": "a"}])
def test_a_token_that_is_not_special_is_refused(marked_file: Path, named: dict[str, str]) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(named))}"):
        load_tokenizer(str(marked_file), **named)
