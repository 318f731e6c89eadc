"""text → tokens, and back. Bytes by default; any `tokenizer.json` through the `tokenizers` library.

Every tokenizer has a separator, a token that is written after each document.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cda_cli.data.hub import hub_file
from cda_cli.data.sizes import sizes_of_tokens
from cda_cli.errors import DataError, brief

if TYPE_CHECKING:
    import tokenizers

BYTES = "bytes"
BPE_PREFIX = "bpe:"
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
# A tokenizer keeps offsets and strings of all the text that it gets at once. Pieces bound that, and run in parallel.
PIECE_CHARACTERS = 1 << 16
# The text of a token depends on at most so many tokens before it.
STREAM_CONTEXT = 32

Ids = Sequence[int] | NDArray[Any]


class StreamDecoder(ABC):
    """Decodes tokens as they come. The parts join to `decode` of all tokens, and no part splits a character."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The characters that `token` completes; "" if it completes none."""

    @abstractmethod
    def flush(self) -> str:
        """The rest at the end. A character that never became whole is U+FFFD."""


class Encoded(NamedTuple):
    """`ids` [N], and `sizes` [N], the bytes of text that each stands for. An unknown token stands for none."""

    ids: NDArray[Any]
    sizes: NDArray[Any]

    @classmethod
    def join(cls, parts: Iterable[Encoded]) -> Encoded:
        """Joins one or more parts end to end."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


class Tokenizer(ABC):
    """Turns text into ids below `vocab_size`, and back.

    `separator` is the id that is written after each document; no text becomes it. `bos` is the id that is written
    before each document and each prompt, or None. `size_dtype` is the type of `Encoded.sizes`.
    """

    name: str
    vocab_size: int
    separator: int
    bos: int | None = None
    fingerprint: str
    size_dtype: np.dtype[Any]

    @property
    def beginning(self) -> Encoded:
        """What stands in front of a document: `bos`, which stands for no text, or nothing."""
        return self._without_text([] if self.bos is None else [self.bos])

    @property
    def prefix(self) -> int:
        """The id from which the first token of a document is predicted: `bos`, or else the separator."""
        return self.separator if self.bos is None else self.bos

    @property
    def ending(self) -> Encoded:
        """The separator, which stands for no text, as it follows a document."""
        return self._without_text([self.separator])

    def _without_text(self, ids: list[int]) -> Encoded:
        return Encoded(np.array(ids, self.dtype), np.zeros(len(ids), self.size_dtype))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id."""
        return np.dtype(np.min_scalar_type(self.vocab_size - 1))

    @abstractmethod
    def encode_batch(self, pieces: Sequence[str]) -> list[Encoded]:
        """The tokens of each piece, without added special tokens. The pieces are as `split_pieces` yields them.

        Raises DataError if the tokenizer cannot encode one.
        """

    def encode(self, text: str) -> NDArray[Any]:
        """The ids [N] of `text`, of `dtype`. No special token is added, and none is read out of the text.

        Raises DataError as `encode_batch` does.
        """
        return self.encode_sized(text).ids

    def encode_sized(self, text: str) -> Encoded:
        """`encode`, with the bytes of each token."""
        empty = Encoded(np.empty(0, self.dtype), np.empty(0, self.size_dtype))
        return Encoded.join([empty, *self.encode_batch(list(split_pieces(text)))])

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """The text of `ids` [N]. Separators and `bos` are dropped, and invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def stream(self, prompt: Ids = ()) -> StreamDecoder:
        """A decoder that takes one token at a time. The first follows the ids `prompt` [N], because the text of a token
        may depend on the tokens before it."""

    @abstractmethod
    def to_json(self) -> str | None:
        """What `tokenizer_from_json` takes; None for bytes."""


class ByteTokenizer(Tokenizer):
    """Ids 0…255 are the bytes of UTF-8. The separator is 0xFF, a byte that never occurs in valid UTF-8."""

    name = BYTES
    vocab_size = 256
    separator = 0xFF
    fingerprint = BYTES
    size_dtype = np.dtype(np.uint8)

    def encode_batch(self, pieces: Sequence[str]) -> list[Encoded]:
        encoded = [np.frombuffer(utf8(piece), dtype=np.uint8) for piece in pieces]
        return [Encoded(ids, np.ones_like(ids)) for ids in encoded]

    def decode(self, ids: Ids) -> str:
        array = np.asarray(ids, dtype=np.uint8)
        raw: bytes = array[array != self.separator].tobytes()
        return raw.decode("utf-8", errors="replace")

    def stream(self, prompt: Ids = ()) -> StreamDecoder:
        return _ByteStream(self.separator)  # no byte depends on the whole characters before it

    def to_json(self) -> None:
        return None


class JsonTokenizer(Tokenizer):
    """Wraps a `tokenizers.Tokenizer`. Its separator is its special token `eos`, or where that is None the first of
    SEPARATORS that it knows and no text can spell, or an id of its own. Its special token `bos` begins a document.

    It switches off the truncation and padding that the file asks for. It encodes the name of a special token inside a
    document as plain text, so a document cannot hold a separator, unless its words spell the `eos` that was named.
    """

    size_dtype = np.dtype(np.uint16)

    def __init__(self, inner: tokenizers.Tokenizer, name: str, bos: str | None = None, eos: str | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._json = inner.to_str()
        inner.encode_special_tokens = True
        inner.post_processor = None  # it may cut the spaces off the offsets of a token
        model = json.loads(self._json)["model"]
        special = {token.content: id for id, token in inner.get_added_tokens_decoder().items() if token.special}
        for setting, token in (("bos", bos), ("eos", eos)):
            if token is not None and token not in special:
                raise DataError(
                    f"the tokenizer {name} has no special token {token!r}; set data.{setting} to one that it has, or "
                    "to null"
                )
        known = [special[token] for token in SEPARATORS if token in special and not _can_spell(model, inner, token)]
        known = known if eos is None else [special[eos]]
        size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._inner = inner
        self._unknown = model.get("unk_id")
        if model.get("unk_token") is not None:
            self._unknown = inner.token_to_id(model["unk_token"])
        self.name = name
        self.separator = known[0] if known else size
        self.vocab_size = size if known else size + 1
        self.bos = None if bos is None else special[bos]
        self._not_text = {self.separator, self.bos}
        chosen = "" if bos is None and eos is None else json.dumps([bos, eos])
        self.fingerprint = blake2b(utf8(self._json + chosen), digest_size=16).hexdigest()

    def encode_batch(self, pieces: Sequence[str]) -> list[Encoded]:
        texts = [without_surrogates(piece) for piece in pieces]
        try:
            encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises the bare Exception
            raise DataError(
                f"the tokenizer {self.name} cannot encode the text ({brief(error)}); give it a token for what is "
                "unknown, or leave out the text that it has no token for"
            ) from error
        return [self._encoded(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _encoded(self, text: str, encoding: tokenizers.Encoding) -> Encoded:
        ids = np.array(encoding.ids, dtype=self.dtype)
        if not len(ids):
            return Encoded(ids, np.empty(0, self.size_dtype))
        sizes = sizes_of_tokens(text, np.array(encoding.offsets), self._lengths[ids])
        if self._unknown is not None:
            sizes[ids == self._unknown] = 0
        return Encoded(ids, sizes)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """The characters of each token [vocab_size], as the vocabulary spells it; at least 1."""
        return np.array([len(self._inner.id_to_token(id) or " ") for id in range(self.vocab_size)])

    def decode(self, ids: Ids) -> str:
        kept = [int(token) for token in ids if self.is_text(int(token))]
        return str(self._inner.decode(kept, skip_special_tokens=False))

    def stream(self, prompt: Ids = ()) -> StreamDecoder:
        return _JsonStream(self, prompt)

    def is_text(self, token: int) -> bool:
        """Whether `token` is neither the separator nor `bos`."""
        return token not in self._not_text

    def is_byte(self, token: int) -> bool:
        """Whether `token` stands for one byte of a character that the vocabulary lacks, such as <0xE2>."""
        return re.fullmatch("<0x[0-9A-F]{2}>", self._inner.id_to_token(token) or "") is not None

    def to_json(self) -> str:
        return self._json


class _ByteStream(StreamDecoder):
    def __init__(self, separator: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._separator = separator

    def push(self, token: int) -> str:
        return "" if token == self._separator else self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _JsonStream(StreamDecoder):
    """Decodes the latest tokens again with each new one, and takes what the text has gained. The text of a token may
    depend on those before it (a leading space, a character that is spread over several tokens)."""

    def __init__(self, tokenizer: JsonTokenizer, prompt: Ids) -> None:
        self._tokenizer = tokenizer
        self._ids = [int(token) for token in prompt][-STREAM_CONTEXT:]
        self._said_text = tokenizer.decode(self._ids)

    def push(self, token: int) -> str:
        if not self._tokenizer.is_text(token):
            return ""
        self._ids.append(token)
        # Byte tokens in a row become text together, or U+FFFD together, so nothing is known before the row has ended.
        if self._tokenizer.is_byte(token):
            return ""
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # perhaps the first bytes of a character
            return ""
        new = text[len(self._said_text) :]
        if len(self._ids) > 2 * STREAM_CONTEXT:
            self._ids = self._ids[-STREAM_CONTEXT:]
            text = self._tokenizer.decode(self._ids)
        self._said_text = text
        return new

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._said_text) :]


def _can_spell(model: dict[str, Any], inner: tokenizers.Tokenizer, token: str) -> bool:
    """Whether `model`, as tokenizer.json has it, may give `token` for plain text. Its vocabulary must have the token,
    and if the model only joins pairs, a pair must become it."""
    if token not in inner.get_vocab(with_added_tokens=False):
        return False
    joins_pairs = model.get("type") == "BPE" and not (
        model.get("ignore_merges") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    )
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    return not joins_pairs or any("".join(pair) == token for pair in pairs)


def utf8(text: str) -> bytes:
    """The UTF-8 of any str. A lone surrogate, which has no UTF-8, becomes '?'."""
    return text.encode("utf-8", errors="replace")


def without_surrogates(text: str) -> str:
    """`text` as UTF-8 can hold it. A lone surrogate becomes '?'."""
    return text if text.isascii() else utf8(text).decode("utf-8")


def split_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most PIECE_CHARACTERS, cut after a line end, else before a space, else anywhere."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start + 1, limit)
        end = end if end > start else limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def load_tokenizer(spec: str, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    """The tokenizer named by `spec`: "bytes", a path to a tokenizer.json, or a hub id.

    `bos` and `eos` are its tokens that begin and end a document (see `JsonTokenizer`). Raises DataError, also for
    `bpe:N`, which `bpe.trained_bpe` trains on the prepared text.
    """
    if spec == BYTES and (bos or eos):
        raise DataError("bytes have no special tokens; set data.bos and data.eos to null, or name a tokenizer.json")
    if spec == BYTES:
        return ByteTokenizer()
    if spec.startswith(BPE_PREFIX):
        raise DataError(
            f"{spec} is trained on the whole training text, which --streaming does not read first; leave out "
            "--streaming, or give the tokenizer.json of a checkpoint that was trained with it"
        )
    path = Path(spec).expanduser()
    try:
        if path.is_file():
            return _from_file(path, path.name, bos, eos)
        hub_id = not path.exists() and path.suffix != ".json" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec)
    except OSError:  # such as a name that is too long
        hub_id = None
    if not hub_id:
        raise DataError(
            f"there is no tokenizer file {spec}; give --tokenizer bytes, bpe:N, a tokenizer.json or a hub id"
        )
    return _from_file(hub_file(spec, "tokenizer.json"), spec, bos, eos)


def tokenizer_from_json(
    text: str | None, name: str = "tokenizer.json", bos: str | None = None, eos: str | None = None
) -> Tokenizer:
    """The tokenizer whose `to_json()` was `text`. Raises DataError if it is not one."""
    if text is None:
        return ByteTokenizer()
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises the bare Exception for a bad file
        raise DataError(
            f"{name} is not a tokenizer that the tokenizers library reads ({brief(error)}); give --tokenizer another "
            "tokenizer.json"
        ) from error
    return JsonTokenizer(inner, name, bos, eos)


def _from_file(path: Path, name: str, bos: str | None, eos: str | None) -> Tokenizer:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a byte order mark is no JSON
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the tokenizer {path} cannot be read ({brief(error)}); give --tokenizer another tokenizer.json"
        ) from error
    return tokenizer_from_json(text, name, bos, eos)
