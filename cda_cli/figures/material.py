"""What figures are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from cda_cli.causal import Examined
from cda_cli.restore import Restored, TextSide
from cda_cli.runs.folder import Run
from cda_cli.runs.records import TrainRecord

MOST_RECORDS = 500  # of training: more than a line in a picture can show


class HeadMap(NamedTuple):
    """The weights of one head over the beginning of a text: `weights` [T][S] of `tokens` [T], null keys first."""

    layer: int
    head: int
    tokens: Sequence[str]
    weights: Sequence[Sequence[float]]


class Material(NamedTuple):
    """What was `examined` of a model, the weights of a head, and records of the run in `training`, oldest first.

    `source` says in a sentence what was inspected.
    """

    source: str
    examined: Examined
    head_map: HeadMap
    training: Sequence[TrainRecord]


def gather(examined: Examined, restored: Restored, text: TextSide, drawn: tuple[int, int], weights: Tensor) -> Material:
    """Gathers what figures are made from.

    `weights` [T, S] are those of the layer and head `drawn` over the first window of `text`. The records of training
    are those of the run that the checkpoint lies in, up to its step; there are none elsewhere.
    """
    tokens = [restored.tokenizer.decode([int(token)]) for token in text.sides[0].ids[: len(weights)]]
    run = Run(restored.path.resolve().parent.parent)
    training = [each for each in run.records(TrainRecord, most=MOST_RECORDS) if each.step <= restored.state["step"]]
    source = f"{restored.path} on {text.description}, {text.split}: {examined.report.extent}."
    head_map = HeadMap(*drawn, tokens, weights.tolist())
    return Material(source, examined, head_map, training)
