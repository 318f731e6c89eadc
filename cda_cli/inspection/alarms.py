"""Heads that have stopped to select: they read one key or the beginning of the window alone, or everything alike.

The thresholds are on figures that training records anyway, so an alarm costs a step nothing. Shapes: L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from cda_cli.runs.records import HeadAlarm

# Times the fewest keys that can share a row. With k = 1, more than 99 % of the mass is then on one key. With k = 2
# nearly all of it is on two capped keys, and the score of a capped key gets no gradient.
COLLAPSED = 1.05
# Of the distance to the first key, on average, which no row can exceed. With 95 % of the mass on the first key and the
# rest on the query's own it is 0.95.
SINK = 0.95
# Of all keys that a query sees, on average: 0.05 nats below the largest entropy. The scores of a softmax with random
# weights come this near to equal, and training has then not moved them.
SPREAD = 0.95
# A head whose k is more than this share of the keys that a query sees, on average, is not judged: too many of its rows
# see no more than k keys, and have no choice.
CHOICE = 0.25


def head_alarms(heads: Mapping[str, Tensor], tokens: int, null_keys: int) -> tuple[HeadAlarm, ...]:
    """Judges each head by the means of its measures [L, H] over the rows of windows of so many tokens.

    What is on null keys has no distance: a head that reads these alone has collapsed.
    """
    furthest = (tokens - 1) / 2
    visible = furthest + 1 + null_keys
    alarms = []
    for layer in range(len(heads["sparsity_k"])):
        for head in range(heads["sparsity_k"].shape[1]):
            k, support, back = (
                heads[name][layer, head].item() for name in ("sparsity_k", "effective_support", "distance_back")
            )
            if k > CHOICE * visible:
                continue
            if back >= SINK * furthest:
                alarms.append(HeadAlarm(layer=layer, head=head, state="sink"))
            elif support <= COLLAPSED * fewest_keys(k):
                alarms.append(HeadAlarm(layer=layer, head=head, state="collapsed"))
            elif support >= SPREAD * visible:
                alarms.append(HeadAlarm(layer=layer, head=head, state="spread"))
    return tuple(alarms)


def fewest_keys(k: float) -> float:
    """The smallest effective support of a row that sums to k: as many capped keys as fit, and one for the rest."""
    if k <= 1:
        return 1.0
    rest = k - math.floor(k)
    return math.exp(math.log(k) - (rest * math.log(rest) / k if rest else 0.0))  # exp(−Σ p ln p) of these weights
