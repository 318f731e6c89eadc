"""What `cda eval` sums on request beside the losses: the loss by position, and the calibration of the model.

Shapes: B rows of a batch, T positions, P ranges of positions, M bins of confidence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from cda_cli.data import IGNORE
from cda_cli.evaluation.intervals import ratio_error
from cda_cli.evaluation.predictions import Predictions

BINS = 15


class Detail(ABC):
    """Something that is summed over the tokens of each window: `width` numbers."""

    name: str
    width: int

    @abstractmethod
    def sums(self, predicted: Predictions) -> Tensor:
        """Returns the sums of a batch, float64 [B, width]."""

    @abstractmethod
    def summary(self, sums: Tensor) -> Any:
        """Turns the sums over observations, [U, width], into what `--json` has under `name`."""


class LossByPosition(Detail):
    """The loss by how many tokens of its window a prediction sees: 1, 2, 3 to 4, 5 to 8, and so on.

    `trained` is the context of the training; a range ends there too, so that none mixes what was trained with what
    was not.
    """

    name = "positions"

    def __init__(self, context: int, trained: int) -> None:
        powers = {2**power for power in range(context.bit_length())}
        self.ends = sorted({*powers, context} | ({trained} if trained < context else set()))
        self.width = 2 * len(self.ends)

    def sums(self, predicted: Predictions) -> Tensor:
        losses_BT = predicted.losses
        seen_T = torch.arange(1, losses_BT.shape[1] + 1, device=losses_BT.device)
        ends_P = torch.tensor(self.ends, device=losses_BT.device)
        within_TP = torch.nn.functional.one_hot(torch.searchsorted(ends_P, seen_T), len(self.ends)).double()
        counted_BT = (predicted.targets != IGNORE).double()
        return torch.cat((losses_BT.double() @ within_TP, counted_BT @ within_TP), 1)

    def summary(self, sums: Tensor) -> list[dict[str, Any]]:
        nats, counts = sums.chunk(2, 1)
        first, found = 1, []
        for place, last in enumerate(self.ends):
            tokens = int(counts[:, place].sum())
            loss = nats[:, place].sum().item() / tokens if tokens else math.nan
            error = ratio_error(nats[:, place], counts[:, place])
            found.append({"first": first, "last": last, "tokens": tokens, "loss": loss, "standard_error": error})
            first = last + 1
        return found


class Calibration(Detail):
    """How often the likeliest token is the right one, where the model gives it a certain probability, its confidence.

    The expected calibration error is Σ |hits − Σ confidence| over BINS bins of equal width, divided by the number of
    tokens (Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3).
    """

    name = "calibration"
    width = 3 * BINS

    def sums(self, predicted: Predictions) -> Tensor:
        confidence_BT = predicted.confidence
        # A bin has its upper edge, and not its lower.
        bins_BT = (confidence_BT * BINS).ceil().long().clamp(1, BINS) - 1
        within_BTM = torch.nn.functional.one_hot(bins_BT, BINS) * (predicted.targets != IGNORE).unsqueeze(-1)
        hits_BT = predicted.likeliest == predicted.targets
        values = (torch.ones_like(confidence_BT), confidence_BT, hits_BT)
        return torch.cat([(within_BTM * value.double().unsqueeze(-1)).sum(1) for value in values], 1)

    def summary(self, sums: Tensor) -> dict[str, Any]:
        counts, confidences, hits = sums.sum(0).chunk(3)
        tokens = counts.sum().item()
        bins = [
            {
                "low": place / BINS,
                "high": (place + 1) / BINS,
                "tokens": int(counts[place]),
                "confidence": (confidences[place] / counts[place]).item(),
                "accuracy": (hits[place] / counts[place]).item(),
            }
            for place in range(BINS)
        ]
        return {
            "expected_calibration_error": (hits - confidences).abs().sum().item() / tokens,
            "accuracy": hits.sum().item() / tokens,
            "confidence": confidences.sum().item() / tokens,
            "bins": bins,
        }
