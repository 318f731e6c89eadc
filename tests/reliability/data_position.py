"""Whatever is cut, and however often, each token comes once and in its turn."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cda_cli.config import DataConfig
from cda_cli.data import Batch, ByteTokenizer, StreamedBatches, Tokens, TrainBatches
from tests.reliability.variants import broken

STATE_BYTES = 4096
BYTES = ByteTokenizer()
Stream = Iterator[tuple[Batch, dict[str, Any]]]


class Plan(NamedTuple):
    """The batches that are read before each cut, and after the last."""

    reads: list[int]
    rest: int

    @classmethod
    def draw(cls, chance: random.Random, longest: int) -> Plan:
        return cls([chance.randrange(longest) for _ in range(chance.randint(1, 5))], chance.randrange(1, longest))

    @property
    def total(self) -> int:
        return sum(self.reads) + self.rest


def told(batch: Batch) -> bytes:
    return batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()


def fault_of(open_stream: Any, plan: Plan) -> str | None:
    """Reads without a cut, and with those of the plan, and says what differs.

    Between two parts the hidden random state is changed, as a fresh process would have another.
    """
    torch.manual_seed(1)
    through = [told(batch) for batch, _ in itertools.islice(open_stream(None), plan.total)]
    state: Mapping[str, Any] | None = None
    parts: list[bytes] = []
    for number, reads in enumerate([*plan.reads, plan.rest]):
        torch.manual_seed(100 + number)
        np.random.seed(100 + number)
        random.seed(100 + number)
        for batch, after in itertools.islice(open_stream(state), reads):
            parts.append(told(batch))
            state = after
        text = json.dumps(state)
        if len(text) > STATE_BYTES:
            return f"the state has {len(text)} bytes"
        state = json.loads(text)
    for number, (part, whole) in enumerate(zip(parts, through, strict=True)):
        if part != whole:
            return f"batch {number} of {plan.total} differs with the cuts {plan.reads}"
    return None


def mapped(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Cuts passes over a memory-mapped text at random places, and counts each token over two passes."""
    chance = random.Random(seed)
    with broken(variant):
        for _ in range(count):
            # Each token is its own number, so that a pass can be counted.
            ids = np.arange(chance.randrange(40, 400), dtype=np.uint16)
            tokens = Tokens(ids, np.ones_like(ids), len(ids))
            seq_len, batch_size, key = chance.randrange(2, 30), chance.randrange(1, 7), chance.randrange(10**6)
            shifted = chance.random() < 0.5

            def open_stream(
                state: Any, given: Any = (tokens, seq_len, batch_size, key), shifted: bool = shifted
            ) -> Stream:
                return TrainBatches(*given, state, shifted=shifted)

            windows = -(-(len(tokens) - 1) // seq_len)
            plan = Plan.draw(chance, longest=max(2, 2 * windows // batch_size))
            fault = fault_of(open_stream, plan)
            # The passes of shifted windows differ in their number of windows.
            yield fault or (None if shifted else count_of_passes(open_stream, windows, len(tokens)))


def count_of_passes(open_stream: Any, windows: int, tokens: int) -> str | None:
    """Says whether each token but the first was a target once a pass, over as many passes as make full batches."""
    batches = itertools.islice(open_stream(None), windows)
    targets = torch.cat([batch.targets.flatten() for batch, _ in batches])
    counts = torch.bincount(targets[targets >= 0], minlength=tokens)
    if counts[0] or counts[1:].unique().numel() != 1:
        return f"of {tokens} tokens {int((counts != counts.max()).sum()) - 1} were not a target as often as the others"
    return None


def streamed(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Cuts passes over a streamed text at random places.

    The text is in 1, 3 or 7 files, with empty documents and documents that are longer than a window.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, broken(variant):
        folder = Path(name)
        configs = [write_documents(chance, folder, files) for files in (1, 3, 7)]
        for _ in range(count):
            config, text = chance.choice(configs)
            seq_len, batch_size = chance.choice([2, 7, 16, 40]), chance.randrange(1, 5)

            def open_stream(state: Any, given: Any = (config, BYTES, seq_len, batch_size)) -> Stream:
                return StreamedBatches(*given, state)

            batches = len(text) // (seq_len * batch_size)
            plan = Plan.draw(chance, longest=max(2, batches // 2))
            yield fault_of(open_stream, plan) or fault_of_tokens(open_stream, text, plan.total)


def fault_of_tokens(open_stream: Any, text: bytes, batches: int) -> str | None:
    """Says whether the tokens, joined, are the documents in their order, again and again."""
    inputs = [batch.inputs.flatten() for batch, _ in itertools.islice(open_stream(None), batches)]
    found = bytes(torch.cat(inputs).tolist())
    wanted = (text * (len(found) // len(text) + 1))[: len(found)]
    return None if found == wanted else "the tokens are not those of the documents in their order"


def write_documents(chance: random.Random, folder: Path, files: int) -> tuple[DataConfig, bytes]:
    """Writes a data set in so many files, and returns the bytes of each training document with its separator."""
    from cda_cli.data.split import HashRule

    rule = HashRule.of_fraction(0.1)
    kept = b""
    for number in range(files):
        lengths = [chance.choice([0, 1, 3, 15, 16, 17, 40, 150]) for _ in range(42 // files)]
        texts = ["".join(chance.choice("abcdefgh \n") for _ in range(length)) for length in lengths]
        path = folder / f"{files}-{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        kept += b"".join(text.encode() + b"\xff" for text in texts if text and not rule.held_out(text))
    pattern = os.path.join(folder, f"{files}-*.jsonl")  # noqa: PTH118 - a glob
    return DataConfig(source=pattern, streaming=True, validation_fraction=0.1), kept
