"""Scores continuations: (context, continuation) in tokens → the log-probability of the continuation.

Shapes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.errors import ConfigError
from cda_cli.model import Transformer
from cda_cli.plurals import counted
from cda_cli.runtime import autocast

TokenPair = tuple[Sequence[int], Sequence[int]]  # context and continuation


class Loglikelihood(NamedTuple):
    """`nats` is the natural logarithm of the probability of a continuation, summed over its `tokens`.

    `is_greedy` says whether each token was the likeliest one at its place. `is_truncated` says whether the model saw
    less than the whole context.
    """

    nats: float
    is_greedy: bool
    tokens: int
    is_truncated: bool


@torch.no_grad()
def loglikelihoods(
    model: Transformer,
    pairs: Sequence[TokenPair],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda pairs: None,
) -> list[Loglikelihood]:
    """Scores each continuation after as much of its context as `model`, in evaluation mode, can see.

    Pairs that differ in their last token alone share a row. `dtype` is that of the matrix products; log-probabilities
    are float32, and their sums are float64. `advance` gets the number of pairs that each batch has scored. Raises
    ConfigError, at once, for a pair whose context is empty, or whose continuation is empty or longer than the context
    of the model.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        _check(context, continuation, model.config.seq_len)
        seen = (*context, *continuation)[-model.config.seq_len - 1 : -1]
        rows.setdefault(seen, []).append(index)
    longest_first = sorted(rows.items(), key=lambda row: len(row[0]), reverse=True)
    found: dict[int, Loglikelihood] = {}
    for start in range(0, len(longest_first), batch_size):
        batch = longest_first[start : start + batch_size]
        inputs_BT = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.int64)
        for row, (seen, _) in enumerate(batch):
            inputs_BT[row, : len(seen)] = torch.tensor(seen)  # what fills the row stands behind, where no token sees it
        with autocast(device, dtype):
            logits_BTV = model(inputs_BT.to(device))
        indices = [index for _, each in batch for index in each]
        scores = [
            _score(logits_TV[: len(seen)], pairs[index][1])
            for logits_TV, (seen, each) in zip(logits_BTV, batch, strict=True)
            for index in each
        ]
        for index, (nats, is_greedy) in zip(indices, torch.stack(scores).tolist(), strict=True):
            tokens = len(pairs[index][1])
            is_truncated = len(pairs[index][0]) + tokens > model.config.seq_len + 1
            found[index] = Loglikelihood(nats, bool(is_greedy), tokens, is_truncated)
        advance(len(indices))
    return [found[index] for index in range(len(pairs))]


def _score(logits_TV: Tensor, continuation: Sequence[int]) -> Tensor:
    """Returns log-probability and `is_greedy`, as float64 [2]. The last row of logits is about the last token."""
    targets = torch.tensor(continuation, device=logits_TV.device)
    log_probabilities = logits_TV[-len(targets) :].float().log_softmax(-1)
    nats = log_probabilities.gather(-1, targets[:, None]).double().sum()
    is_greedy = (log_probabilities.argmax(-1) == targets).all()
    return torch.stack([nats, is_greedy.double()])


def _check(context: Sequence[int], continuation: Sequence[int], seq_len: int) -> None:
    if not context:
        raise ConfigError("nothing stands before the text to predict it from; put at least one token there")
    if not continuation:
        raise ConfigError("a continuation has no token of its own to predict; give it some text after its context")
    if len(continuation) > seq_len:
        raise ConfigError(
            f"the continuation has {counted(len(continuation), 'token')} and the model's context {seq_len}; shorten it"
        )
