"""A tokenizer as transformers reads it: a tokenizer.json that gives a text the same ids, and its special tokens."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from cda_cli.data import Tokenizer
from cda_cli.data.tokenizers import SEPARATORS
from cda_cli.errors import DataError

if TYPE_CHECKING:
    import tokenizers


class HfTokenizer(NamedTuple):
    """`special` maps the roles bos, eos and pad to the id of a token of `inner`."""

    inner: tokenizers.Tokenizer
    special: dict[str, int]


def hf_tokenizer(tokenizer: Tokenizer) -> HfTokenizer:
    """Makes the tokenizer for transformers, which adds no token to a text but `bos`, in front, if there is one.

    Without it the separator, which stands between documents, both begins and ends a text. It also fills what no model
    reads. Raises DataError where no token can have the id of the separator.
    """
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    text = tokenizer.to_json()
    inner = _bytes(tokenizer.separator) if text is None else tokenizers.Tokenizer.from_str(text)
    separator = inner.id_to_token(tokenizer.separator)
    if separator is None:
        known = inner.get_vocab(with_added_tokens=True)
        separator = next(name for name in (*SEPARATORS, "<|separator|>") if name not in known)
    inner.add_special_tokens([separator])
    inner.post_processor = None
    if tokenizer.bos is not None:
        first = inner.id_to_token(tokenizer.bos)
        inner.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, tokenizer.bos)])
    if inner.token_to_id(separator) != tokenizer.separator:
        raise DataError(
            f"no token of {tokenizer.name} can have the id {tokenizer.separator} of its separator, as its ids have "
            "gaps; train with a tokenizer.json that has a special token such as <|endoftext|>"
        )
    return HfTokenizer(inner, {"bos": tokenizer.prefix, "eos": tokenizer.separator, "pad": tokenizer.separator})


def _bytes(separator: int) -> tokenizers.Tokenizer:
    """Makes a byte-level BPE without merges, whose ids are the bytes.

    The separator is a byte that no text has, so its entry is the special token. As the letter ÿ, which stands for this
    byte, it would be found in texts.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    entries = _letters()
    entries[separator] = SEPARATORS[0]
    made = tokenizers.Tokenizer(models.BPE({entry: byte for byte, entry in enumerate(entries)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE, as in encoder.py of GPT-2."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
