"""The tokenizer of a model of another tool: its tokenizer.json, or one built from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from cda_cli.errors import CheckpointError, brief
from cda_cli.interchange.weights import read_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
# What a person can do where a model has no tokenizer that can be read.
REMEDY = "give --tokenizer the tokenizer.json of the model"

# The kinds of tokens of a GGUF file.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
# How the text is split before its bytes are joined, by `tokenizer.ggml.pre`. The expressions are those of llama.cpp.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[str, str | None] = {  # None is the expression of GPT-2, which the library has
    "default": None,
    "gpt-2": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "smollm": None,
}
SPLITS_DIGITS = {"smollm"}  # each digit is a piece of its own


class SourceTokenizer(NamedTuple):
    """A tokenizer.json, the token that begins a document and a prompt, and the token that ends a document."""

    text: str
    bos: str | None
    eos: str | None


def tokenizer_of_folder(folder: Path, config: Mapping[str, Any]) -> SourceTokenizer:
    """The tokenizer of a folder that transformers has saved. Raises CheckpointError where it has none."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}; {REMEDY}")
    try:
        text = (folder / TOKENIZER_FILE).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / TOKENIZER_FILE} cannot be read ({error}); {REMEDY}") from error
    options = folder / "tokenizer_config.json"
    tokenizer_config = read_json(options) if options.is_file() else {}
    return tokenizer_of_text(text, str(folder / TOKENIZER_FILE), config, tokenizer_config)


def tokenizer_of_text(
    text: str, name: str, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any] = MappingProxyType({})
) -> SourceTokenizer:
    """The tokenizer of a tokenizer.json called `name`, with what config.json and tokenizer_config.json say of it.

    Raises CheckpointError where it is none.
    """
    made, first = _parsed(text, name)
    bos = _word(tokenizer_config.get("bos_token")) or first
    adds_bos = tokenizer_config.get("add_bos_token", first is not None)
    eos = _word(tokenizer_config.get("eos_token"))
    if eos is None or made.token_to_id(eos) is None:
        eos = _token(made, config.get("eos_token_id"))
    return _with_special(made, bos if adds_bos else None, eos)


def tokenizer_of_gguf(metadata: Mapping[str, Any]) -> SourceTokenizer:
    """The tokenizer that the metadata of a GGUF file describes.

    Raises CheckpointError for one of another kind than byte-level BPE (gpt2) and SentencePiece's BPE (llama).
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = fields.get("model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(kind))
    if build is None or not fields.get("tokens"):
        raise CheckpointError(f"cda has no tokenizer of the kind {kind!r}, which the GGUF file asks for; {REMEDY}")
    try:
        made = build(fields)
    except (LookupError, ValueError, TypeError) as error:
        raise CheckpointError(f"the tokenizer of the GGUF file is damaged ({error}); {REMEDY}") from error
    # As llama.cpp has it where the file does not say.
    usual = kind == "llama" or SPLITS.get(str(fields.get("pre"))) == _LLAMA3_SPLIT
    tokens, adds_bos = fields["tokens"], fields.get("add_bos_token", usual)
    ids = {name: fields.get(f"{name}_token_id") for name in ("bos", "eos")}
    words = {name: tokens[id] if id is not None and id < len(tokens) else None for name, id in ids.items()}
    return _with_special(made, words["bos"] if adds_bos else None, words["eos"])


def fitted(source: SourceTokenizer, rows: int) -> SourceTokenizer:
    """`source` with as many tokens as the embedding has rows: rows that no token has get one that no text spells.

    Raises CheckpointError where there are more tokens than rows.
    """
    import tokenizers

    made = tokenizers.Tokenizer.from_str(source.text)
    size = _size(made)
    if size > rows:
        raise CheckpointError(f"the tokenizer has {size:,} tokens and the model {rows:,}; {REMEDY}")
    _make_special(made, [f"<|unused_{id}|>" for id in range(size, rows)])
    if _size(made) != rows:
        raise CheckpointError(f"the tokenizer has {size:,} tokens, not the {rows:,} of the model; {REMEDY}")
    return source._replace(text=made.to_str())


def _size(made: tokenizers.Tokenizer) -> int:
    return max(made.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _parsed(text: str, name: str) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer, and the token that its file puts in front of a text, if it is one."""
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(text)
        made.no_truncation()
        with_first, without = (made.encode("a", add_special_tokens=add).ids[:1] for add in (True, False))
    except Exception as error:  # the library raises the bare Exception for a bad file
        raise CheckpointError(f"{name} is not a tokenizer that the library reads ({brief(error)}); {REMEDY}") from error
    return made, made.id_to_token(with_first[0]) if with_first != without else None


def _with_special(made: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> SourceTokenizer:
    """Makes special tokens of `bos` and `eos`, so that no text spells them; one that the vocabulary lacks is None."""
    known = [word if word is not None and made.token_to_id(word) is not None else None for word in (bos, eos)]
    _make_special(made, [word for word in known if word is not None])
    return SourceTokenizer(made.to_str(), *known)


def _make_special(made: tokenizers.Tokenizer, words: Sequence[str]) -> None:
    import tokenizers

    made.add_special_tokens([tokenizers.AddedToken(word, normalized=False, special=True) for word in words])


def _word(value: Any) -> str | None:
    """A token of tokenizer_config.json, which may be an object with options."""
    word = value.get("content") if isinstance(value, dict) else value
    return word if isinstance(word, str) else None


def _token(made: tokenizers.Tokenizer, id: Any) -> str | None:
    id = id[0] if isinstance(id, list) and id else id
    return made.id_to_token(id) if isinstance(id, int) and id >= 0 else None


def _byte_level(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    kind = fields.get("pre", "default")
    if kind not in SPLITS:
        raise CheckpointError(f"cda does not know the pre-tokenizer {kind!r} of the GGUF file; {REMEDY}")
    vocabulary = {token: id for id, token in enumerate(fields["tokens"])}
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in fields["merges"])]
    split = SPLITS[kind]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == _LLAMA3_SPLIT))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("add_space_prefix")), use_regex=split is None)
    if split is not None:
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([first, by_bytes])
    elif kind in SPLITS_DIGITS:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    else:
        made.pre_tokenizer = by_bytes
    if split == _QWEN2_SPLIT:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return _with_added(made, fields)


def _sentencepiece(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BPE over ▁words, whose pairs are joined in the order of their scores."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    tokens = fields["tokens"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    unknown = tokens[fields.get("unknown_token_id", 0)]
    merges = _merges_by_score(vocabulary, fields)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    prefixed = bool(fields.get("add_space_prefix", True))
    begin: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefixed else []
    made.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _with_added(made, fields)


def _merges_by_score(vocabulary: Mapping[str, int], fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, the likeliest first: SentencePiece joins the pair of the best score."""
    ranked = []
    for token, score, kind in zip(fields["tokens"], fields["scores"], fields["token_type"], strict=True):
        if kind in (CONTROL, BYTE):
            continue
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        ranked += [
            (-score, vocabulary[token], pair) for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary
        ]
    return [pair for _, _, pair in sorted(ranked, key=lambda one: one[:2])]


def _with_added(made: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Adds the tokens that the file marks: control tokens are special, and a text spells user-defined ones whole."""
    import tokenizers

    kinds = list(zip(fields["tokens"], fields.get("token_type") or (), strict=False))
    _make_special(made, [token for token, kind in kinds if kind == CONTROL])
    whole = [token for token, kind in kinds if kind == USER_DEFINED]
    made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in whole])
    return made
