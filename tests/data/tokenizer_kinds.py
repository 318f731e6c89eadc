"""A small tokenizer of each kind that tokenizer.json files hold."""

from __future__ import annotations

import json
from collections.abc import Callable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cda_cli.data import JsonTokenizer
from tests.data.samples import LETTERS

TEXTS = [
    *LETTERS,
    "The naïve cat's mat, it don't sit.",
    "ﬁne ﬂow",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's: a token is a string of bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return made


def metaspace() -> tokenizers.Tokenizer:
    """BPE over ▁words, with an unknown token."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama's: ▁words, and a token for each byte of a character that is not in the vocabulary."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    # The trainer made the byte tokens special, which they are not.
    vocabulary, merges = made.get_vocab(), [tuple(pair) for pair in _merges(made)]
    plain = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    plain.normalizer, plain.decoder = made.normalizer, made.decoder
    return plain


def _merges(tokenizer: tokenizers.Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


def unigram() -> tokenizers.Tokenizer:
    """T5's: NFKC, ▁words, pieces by their probability."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    made = tokenizers.Tokenizer(models.Unigram([*pieces, ("▁the", -3.0), ("at", -3.0), ("</s>", -5.0)], unk_id=0))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def word_piece() -> tokenizers.Tokenizer:
    """BERT's: lower case without accents or control characters, ##continued words, spaces that no token stands for."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    special = ["[UNK]", "[SEP]"]
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    return made


def word_level() -> tokenizers.Tokenizer:
    """Whole words, without a decoder."""
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1, "the": 2, ".": 3, "a": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def word_ends() -> tokenizers.Tokenizer:
    """CLIP's: the last token of a word ends with </w>; no unknown token, so that other characters are dropped."""
    made = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, end_of_word_suffix="</w>", show_progress=False))
    return made


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    made.__name__: made for made in (byte_level, metaspace, byte_fallback, unigram, word_piece, word_level, word_ends)
}


def tokenizer_of_kind(kind: str) -> JsonTokenizer:
    return JsonTokenizer(KINDS[kind](), kind)
