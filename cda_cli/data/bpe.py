"""Training side → a byte-level BPE (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2), trained once and cached.

The merges depend on the text, the size and the version of `tokenizers` alone: it breaks ties between pairs by their
ids, whatever the number of its threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cda_cli.data.cache import Preparation
from cda_cli.data.fingerprint import digest
from cda_cli.data.sources import Source
from cda_cli.data.split import Pass, in_sides
from cda_cli.data.tokenizers import (
    BPE_PREFIX,
    SEPARATORS,
    Tokenizer,
    split_pieces,
    tokenizer_from_json,
    utf8,
    without_surrogates,
)
from cda_cli.errors import DataError

SMALLEST = 257  # the bytes and a separator
# A pair that occurs once is no pattern of the text.
MIN_FREQUENCY = 2
TOKENIZER_FILE = "tokenizer.json"


def bpe_size(spec: str) -> int | None:
    """The vocabulary size N of the tokenizer `bpe:N`, separator included; None for another. Raises DataError."""
    if not spec.startswith(BPE_PREFIX):
        return None
    size = spec.removeprefix(BPE_PREFIX)
    if not re.fullmatch("[0-9]{1,7}", size) or int(size) < SMALLEST:
        raise DataError(
            f"{spec} is no size of a vocabulary; write --tokenizer bpe:N, where N is a whole number of at least "
            f"{SMALLEST}, the bytes and a separator, such as bpe:8192"
        )
    return int(size)


def trained_bpe(
    size: int,
    source: Source,
    fraction: float,
    preparation: Preparation,
    bos: str | None = None,
    eos: str | None = None,
) -> Tokenizer:
    """A byte-level BPE of `size` tokens, trained on the training side of `source`, or the one that the cache has.

    `fraction` is the share that is held out, and `bos` and `eos` are as in `load_tokenizer`. Raises DataError for bad
    data and if the text has too few pairs of tokens for `size`.
    """
    import tokenizers

    key = digest(BPE_PREFIX, tokenizers.__version__, size, MIN_FREQUENCY, source.fingerprint, fraction)

    def make(folder: Path) -> None:
        text = in_sides(source, fraction, lambda passes: _train(size, passes, source, preparation))
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")

    tokenizer, _ = preparation.cached("tokenizers", key, "trained tokenizer", lambda folder: _load(folder, size), make)
    if tokenizer.vocab_size < size:
        raise DataError(
            f"{source.description} has text for {tokenizer.vocab_size} tokens only; write --tokenizer "
            f"{BPE_PREFIX}{tokenizer.vocab_size}, or give --data more text"
        )
    return tokenizer_from_json(tokenizer.to_json(), tokenizer.name, bos, eos)


def _load(folder: Path, size: int) -> Tokenizer | None:
    try:
        text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        return tokenizer_from_json(text, f"{BPE_PREFIX}{size}")
    except (OSError, UnicodeError, DataError):
        return None


def _train(size: int, passes: list[Pass], source: Source, preparation: Preparation) -> str:
    """The tokenizer.json of a BPE that is trained on the training side of `passes`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_training_pieces(passes, source, preparation), trainer)
    return made.to_str()


def _training_pieces(passes: list[Pass], source: Source, preparation: Preparation) -> Iterator[str]:
    """The training side in the pieces that are tokenised later."""
    with preparation.bar("tokenizer", source.total_bytes) as bar:
        for documents, rule in passes:
            for document in documents:
                for side, part, _ in rule.place(document):
                    if side == "train":
                        yield from map(without_surrogates, split_pieces(part))
                bar.update(len(utf8(document)))
                preparation.check()
