"""tokens → batches. T = seq_len, B = batch_size, N = tokens of a split.

Window i covers the targets [i·T + 1, (i + 1)·T], or with a shift s < T of a pass those from i·T + 1 − s. If the first
or the last window would be short, it is moved until it is full, and the targets that it shares with its neighbour are
IGNORE. So each token but the very first is a target exactly once in a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cda_cli.data.prepare import Corpus, Tokens
from cda_cli.errors import DataError
from cda_cli.plurals import counted
from cda_cli.targets import IGNORE

State = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """`inputs` and `targets`, int64 [B, T]; `targets[:, t]` is the token after `inputs[:, t]`, or IGNORE.

    `target_bytes`, int64 [B], counts the bytes of text that the targets of a row stand for, IGNORE left out.
    """

    inputs: Tensor
    targets: Tensor
    target_bytes: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of the changed tensors."""
        return Batch(change(self.inputs), change(self.targets), change(self.target_bytes))


class Share(NamedTuple):
    """The rows of a step that one of several processes makes: the slice `rows` of each of `batches` batches of `size`.

    Those `batches` are all of the step's rows. A process that is alone makes every row.
    """

    size: int
    batches: int
    rows: slice = slice(None)


def share_of(rank: int, count: int, batch_size: int, grad_accum: int) -> Share:
    """Returns the share of process `rank` of `count` in a step of A = `grad_accum` batches of B = `batch_size` rows.

    Large batches run faster, so each process takes whole batches of B as far as A and `count` have common factors.
    Beyond that, batches are cut into parts. `count` must divide A·B.
    """
    together = math.gcd(grad_accum, count)  # whole batches that are trained on at the same time
    rows = batch_size * together // count
    return Share(batch_size * together, grad_accum // together, slice(rank * rows, (rank + 1) * rows))


def count_windows(tokens: Tokens, seq_len: int, side: str = "text") -> int:
    """The number of windows in a pass, ceil((N − 1) / T). Raises DataError if the text is shorter than one sequence."""
    if len(tokens) <= seq_len:
        remedy = f"--seq-len {len(tokens) - 1} would fit" if len(tokens) > 2 else "give --data more text"
        if side == "validation":
            remedy += ", or raise it with a larger --set data.validation_fraction"
        raise DataError(
            f"the {side} is shorter than one sequence: it has {counted(len(tokens), 'token')}, and seq_len "
            f"{seq_len} takes {seq_len + 1}; {remedy}"
        )
    return -(-(len(tokens) - 1) // seq_len)


def check_lengths(corpus: Corpus, seq_len: int) -> None:
    """Raises DataError if a side of `corpus` is shorter than one sequence."""
    count_windows(corpus.train, seq_len, "training text")
    count_windows(corpus.validation, seq_len, "validation")


class TrainBatches:
    """An endless iterator of (batch, state). The state, plain JSON, resumes *after* that batch.

    Each pass (epoch) takes every window once, in an order that depends on the seed and the epoch alone, and so does the
    shift of its windows, which is 0 unless they are `shifted`. A batch may span two passes. Raises DataError if the
    text is shorter than one sequence, or if `state` belongs to other data, another seq_len, or windows that are
    `shifted` where these are not. A given `state` brings its seed; its batch size may have been another.

    Only the `rows` of each batch are made and read, and the state is the place after all of them (see `Share`).
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        batch_size: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
        rows: slice = slice(None),
        *,
        shifted: bool = False,
    ) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._rows = rows
        self._shifted = shifted
        count_windows(tokens, seq_len, "training text")
        self._seed, self._epoch, self._position = seed, 0, 0
        if state is not None:
            # Only the state of shifted windows has the key.
            check_state(state, {"seq_len": seq_len, "tokens": len(tokens), "shifted": shifted or None})
            check_counts(state, {"seed": 2**63, "epoch": 2**63})
            self._seed, self._epoch = state["seed"], state["epoch"]
        self._shift, self._order = self._plan_epoch()
        if state is not None:
            check_counts(state, {"position": len(self._order)})
            self._position = state["position"]

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        return self

    def __next__(self) -> tuple[Batch, State]:
        chosen: list[NDArray[np.int64]] = []
        missing = self._batch_size
        while missing:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._shift, self._order = self._plan_epoch()
            part = self._order[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            chosen.append(part * self._seq_len - self._shift)
        return _gather(self._tokens, self._seq_len, np.concatenate(chosen)[self._rows]), self.state()

    def state(self) -> State:
        """The place of the iterator: `position` windows into pass `epoch`."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "seq_len": self._seq_len,
            "tokens": len(self._tokens),
            **({"shifted": True} if self._shifted else {}),
        }

    def _plan_epoch(self) -> tuple[int, NDArray[np.int64]]:
        """The shift of the windows of this pass, and their order."""
        # One hash of both, so that no (seed, epoch) shares its order with a neighbour such as (seed + 1, epoch − 1).
        mixed = blake2b(f"{self._seed}/{self._epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
        shift = int(torch.randint(self._seq_len, (), generator=generator)) if self._shifted else 0
        windows = -(-(len(self._tokens) - 1 + shift) // self._seq_len)
        return shift, torch.randperm(windows, generator=generator).numpy()


def to_batch(rows: NDArray[Any], sizes: NDArray[Any], counts: NDArray[np.bool_] | None = None) -> Batch:
    """The batch of `rows` [B, T + 1], consecutive tokens of any integer type, of `sizes` [B, T + 1] bytes of text.

    `counts` [B, T] says which targets count; without it all do.
    """
    whole = torch.from_numpy(rows.astype(np.int64))
    counts = np.ones((len(rows), rows.shape[1] - 1), np.bool_) if counts is None else counts
    return Batch(
        inputs=whole[:, :-1].contiguous(),
        targets=whole[:, 1:].masked_fill(torch.from_numpy(~counts), IGNORE).contiguous(),
        target_bytes=torch.from_numpy(np.where(counts, sizes[:, 1:], 0).sum(1, dtype=np.int64)),
    )


def _gather(tokens: Tokens, seq_len: int, wanted: NDArray[np.int64]) -> Batch:
    """The windows whose first inputs are at the places `wanted`, moved into the text where they reach beyond it."""
    starts = np.clip(wanted, 0, len(tokens) - seq_len - 1)
    places = starts[:, None] + np.arange(seq_len + 1)
    of_wanted = np.arange(seq_len) + (starts - wanted)[:, None]  # the places of the targets in the wanted windows
    return to_batch(tokens.ids[places], tokens.sizes[places], (of_wanted >= 0) & (of_wanted < seq_len))


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises DataError if `state` does not hold what is `expected`."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise DataError(
                f"the saved data position is for {name} {state.get(name)}, and this run has {value}; resume with the "
                "data and settings of the run, or start a new one"
            )


def check_counts(state: Mapping[str, Any], most: Mapping[str, int]) -> None:
    """Raises DataError if a name of `most` is not, in `state`, a whole number from 0 to its value there."""
    for name, limit in most.items():
        if type(state.get(name)) is not int or not 0 <= state[name] <= limit:
            raise DataError(f"the saved data position has {name} {state.get(name)!r}; use an earlier checkpoint")
