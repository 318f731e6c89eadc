"""Loss by position and calibration, against what they mean written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cda_cli.data import IGNORE, Tokens, evaluation_batches, whole_windows
from cda_cli.evaluation import Sums, joined, measure
from cda_cli.evaluation.details import BINS, Calibration, Detail, LossByPosition
from cda_cli.evaluation.predictions import Predictions
from cda_cli.model import Transformer
from tests.model.cases import tiny

CPU = torch.device("cpu")
SEQ_LEN = 11


def build() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny(tied_embeddings=False)).eval()
    nn.init.normal_(model.to_logits.weight, std=1.5)
    return model


def text(count: int) -> Tokens:
    ids = torch.randint(23, (count,), generator=torch.Generator().manual_seed(1)).numpy().astype("uint16")
    return Tokens(ids, np.ones(count, np.uint8), count)


def measured(tokens: Tokens, stride: int, batch_size: int, details: list[Detail]) -> Sums:
    batches = whole_windows([tokens], SEQ_LEN, stride).batches(batch_size)
    (sums,) = joined(measure(build(), batches, CPU, torch.float32, details=details))
    return sums


@settings(max_examples=25)
@given(st.integers(2, 70), st.integers(1, SEQ_LEN), st.integers(1, 6), st.sampled_from([3, 8, SEQ_LEN]))
def test_the_loss_by_position_has_the_loss_as_its_mean(count: int, stride: int, batch_size: int, trained: int) -> None:
    """Each range has the losses of the tokens that see so many tokens of their window."""
    tokens, by_position = text(count), LossByPosition(SEQ_LEN, trained)
    sums = measured(tokens, stride, batch_size, [by_position])
    assert torch.equal(sums.nats, measured(tokens, stride, batch_size, []).nats), "what is looked at changes the losses"
    found = by_position.summary(sums.details)
    assert [one["first"] for one in found] == [1, *(one["last"] + 1 for one in found[:-1])]
    assert found[-1]["last"] == SEQ_LEN
    assert any(one["last"] == trained for one in found), "a range mixes what was trained and what was not"
    expected: dict[int, list[float]] = {}
    for batch in whole_windows([tokens], SEQ_LEN, stride).batches(1):
        with torch.no_grad():
            losses = build()(batch.inputs, targets_BT=batch.targets)[0]
        for place in (batch.targets[0] != IGNORE).nonzero().flatten().tolist():
            expected.setdefault(place + 1, []).append(losses[place].item())
    for one in found:
        within = [loss for seen, each in expected.items() if one["first"] <= seen <= one["last"] for loss in each]
        assert one["tokens"] == len(within)
        if within:
            assert one["loss"] == pytest.approx(math.fsum(within) / len(within), rel=1e-4)
    total = math.fsum(one["loss"] * one["tokens"] for one in found if one["tokens"])
    assert total / (count - 1) == pytest.approx(sums.nats.sum().item() / (count - 1), rel=1e-6)


def test_calibration_is_that_of_each_token() -> None:
    tokens, calibration = text(150), Calibration()
    found = calibration.summary(measured(tokens, SEQ_LEN, 4, [calibration]).details)
    rows: list[tuple[float, bool]] = []
    for batch in evaluation_batches(tokens, SEQ_LEN, 1):
        with torch.no_grad():
            confidence, predicted = build()(batch.inputs)[0].double().softmax(-1).max(-1)
        counted = batch.targets[0] != IGNORE
        rows += zip(confidence[counted].tolist(), (predicted == batch.targets[0])[counted].tolist(), strict=True)
    error = 0.0
    for place, one in enumerate(found["bins"]):
        inside = [row for row in rows if place < row[0] * BINS <= place + 1]
        assert one["tokens"] == len(inside)
        if inside:
            confidence, accuracy = (sum(each) / len(inside) for each in zip(*inside, strict=True))
            assert (one["confidence"], one["accuracy"]) == pytest.approx((confidence, accuracy), rel=1e-4)
            error += abs(confidence - accuracy) * len(inside) / len(rows)
    assert sum(one["tokens"] > 0 for one in found["bins"]) > 3, "too few bins have a token to test anything"
    assert found["expected_calibration_error"] == pytest.approx(error, rel=1e-4)
    assert found["accuracy"] == pytest.approx(sum(hit for _, hit in rows) / len(rows))


def calibrated(logits: list[float], targets: list[int]) -> dict[str, Any]:
    largest, likeliest = (each.expand(1, len(targets)) for each in torch.tensor(logits).softmax(-1).max(-1))
    predicted = Predictions(torch.tensor([targets]), torch.zeros(1, len(targets)), likeliest, largest)
    return Calibration().summary(Calibration().sums(predicted))


def test_a_model_that_knows_how_sure_it_may_be_has_no_error() -> None:
    """Three quarters of the time it says token 0, with a probability of three quarters."""
    logits = [math.log(0.75), math.log(0.25)]
    assert calibrated(logits, [0, 0, 0, 1])["expected_calibration_error"] == pytest.approx(0, abs=1e-6)
    assert calibrated(logits, [1, 1, 1, 1, IGNORE])["expected_calibration_error"] == pytest.approx(0.75)
    assert calibrated([0.0, 1000.0], [1, 1])["expected_calibration_error"] == 0, "certainty has a bin too"
