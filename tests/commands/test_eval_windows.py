"""`cda eval` of several checkpoints, by document, with a stride and with another context."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows

from cda_cli.model import Transformer
from cda_cli.restore import restore
from tests.commands.helpers import Cda, assert_refused

SEPARATOR = 0xFF
DOCUMENTS = [f"Document {number}: " + "a fine text. " * (number % 9) for number in range(40)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rotary(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A run with rotary positions, scaled for a longer context than the text they came from."""
    from tests.commands.helpers import run_cda

    folder = tmp_path_factory.mktemp("rotary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        scaling = ("--set", "model.position=rotary", "--set", "model.rotary_scaling=llama3")
        result = run_cda("train", "--config", tiny, *scaling, "--steps", 2, "--out", folder / "run")
    assert result.code == 0, result.err
    return folder / "run"


def evaluated(cda: Cda, *arguments: object) -> dict[str, Any]:
    result = cda("eval", *arguments, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert isinstance(document, dict)
    return document


@torch.no_grad()
def rolling_losses(model: Transformer, ids: list[int], context: int, stride: int) -> list[float]:
    """The nats of each token of a document, by lm-evaluation-harness: it scores the last tokens of each window."""
    found = []
    for seen, scored in get_rolling_token_windows(ids, SEPARATOR, context, context - stride + 1):
        log_p = model(torch.tensor([seen]))[0].double().log_softmax(-1)[-len(scored) :]
        found += [-log_p[place, token].item() for place, token in enumerate(scored)]
    return found


def model_of(run: Path, context: int | None = None) -> Transformer:
    return restore(run, torch.device("cpu"), context=context).model


@pytest.mark.parametrize("stride", [32, 5])
def test_documents_are_scored_as_lm_evaluation_harness_does(
    cda: Cda, finished: Path, documents: Path, stride: int
) -> None:
    """At any batch size, although documents of unequal length share a batch."""
    model = model_of(finished)
    each = [rolling_losses(model, list(document.encode()), 32, stride) for document in DOCUMENTS]
    nats, sizes = sum(map(math.fsum, each)), len("".join(DOCUMENTS))
    for batch_size in (1, 8, 64):
        arguments = ("--data", documents, "--per-document", "--stride", stride, "--batch-size", batch_size)
        found = evaluated(cda, finished, *arguments)
        assert found["loss"] == pytest.approx(nats / sizes, rel=1e-6)
        assert (found["documents"], found["tokens"], found["text_bytes"]) == (40, sizes, sizes)
        assert (found["context"], found["stride"], found["per_document"]) == (32, stride, True)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes, rel=1e-6)
    assert found["bits_per_token"] == pytest.approx(found["loss"] / math.log(2))
    words = sum(len(document.split()) for document in DOCUMENTS)
    assert found["words"] == words
    assert found["bits_per_word"] == pytest.approx(nats / math.log(2) / words, rel=1e-6)
    assert found["resampled"]["unit"] == "documents"
    assert found["resampled"]["number"] == 40
    residuals = [math.fsum(losses) - found["loss"] * len(losses) for losses in each]
    expected = math.sqrt(sum(residual**2 for residual in residuals) * 40 / 39) / sizes
    assert found["standard_error"] == pytest.approx(expected, rel=1e-5), "a document is one observation"


def test_few_documents_are_resampled_in_windows(cda: Cda, finished: Path, documents: Path) -> None:
    arguments = ("--data", documents, "--per-document", "--stride", 8, "--max-documents", 9)
    found = evaluated(cda, finished, *arguments)
    assert found["documents"] == 9
    assert found["tokens"] == sum(map(len, DOCUMENTS[:9]))
    assert found["resampled"]["unit"].endswith("groups of 4 windows")


def test_a_stride_gives_each_token_more_context(cda: Cda, finished: Path, text: Path) -> None:
    """Of a whole split the first token is none of the targets, and each of the others is one once."""
    found, disjoint = evaluated(cda, finished, "--stride", 8), evaluated(cda, finished)
    model, ids = model_of(finished), list(text.read_text(encoding="utf-8")[-disjoint["tokens"] :].encode())
    ids = [*ids, SEPARATOR][-disjoint["tokens"] - 1 :]
    losses, done = [], 0
    for end in [min(32, len(ids) - 1), *range(40, len(ids) - 1, 8), len(ids) - 1]:
        seen = torch.tensor([ids[max(0, end - 32) : end]])
        with torch.no_grad():
            log_p = model(seen)[0].double().log_softmax(-1)
        new = end - done
        losses += [-log_p[place, ids[end + 1 + place]].item() for place in range(-new, 0)]
        done = end
    assert found["tokens"] == disjoint["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert found["windows"] == 1 + math.ceil((len(losses) - 32) / 8)
    same = evaluated(cda, finished, "--stride", 32)
    assert same == disjoint


def test_a_longer_context_than_in_training(cda: Cda, rotary: Path, documents: Path) -> None:
    """Positions mean what they meant in training, also where they are scaled by its length."""
    trained, longer = model_of(rotary), model_of(rotary, 96)
    tokens = torch.tensor([list(DOCUMENTS[8].encode())])[:, :96]
    with torch.no_grad():
        torch.testing.assert_close(longer(tokens)[:, :32], trained(tokens[:, :32]), rtol=1e-5, atol=1e-5)
    found = evaluated(cda, rotary, "--data", documents, "--per-document", "--context", 96)
    losses = [loss for document in DOCUMENTS for loss in rolling_losses(longer, list(document.encode()), 96, 96)]
    assert found["context"] == 96
    assert found["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_a_shorter_context_than_in_training(cda: Cda, finished: Path, documents: Path) -> None:
    found = evaluated(cda, finished, "--data", documents, "--per-document", "--context", 16)
    losses = [loss for each in DOCUMENTS for loss in rolling_losses(model_of(finished), list(each.encode()), 16, 16)]
    assert found["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_learned_positions_end_with_the_context(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    learned = ("--set", "model.position=learned", "--steps", 2, "--out", tmp_path / "run")
    assert cda("train", "--config", tiny, *learned).code == 0
    refused = cda("eval", tmp_path / "run", "--context", 33)
    assert_refused(refused, "learned positions for 32 tokens", "--context 32 or less")
    assert_refused(cda("eval", tmp_path / "run", "--context", 10**12), "less than or equal to 1048576")


def test_checkpoints_are_compared_with_the_first(cda: Cda, finished: Path) -> None:
    """The difference is that of the figures, paired: a checkpoint differs from itself by nothing, without error."""
    older = finished / "checkpoints" / "step-00000004"
    found = evaluated(cda, finished, older, finished)
    alone = [evaluated(cda, finished), evaluated(cda, older, "--data", found["data"])]
    first, second, again = found["checkpoints"]
    assert first["loss"] == alone[0]["loss"]
    assert second["loss"] == pytest.approx(alone[1]["loss"])
    assert "difference" not in first
    assert second["difference"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])
    low, high = second["difference_interval"]
    assert low < second["difference"] < high
    assert 0 < second["difference_error"] < second["bits_per_byte_error"]
    assert (again["difference"], again["difference_error"], again["difference_interval"]) == (0, 0, [0, 0])
    shown = cda("eval", finished, older).out
    assert f"{second['difference']:+.4f}" in shown
    assert f"{low:+.4f} to {high:+.4f}" in shown
    assert str(older) in shown


def test_cuts_of_each_checkpoint_are_compared_with_that_checkpoint(cda: Cda, finished: Path) -> None:
    older = finished / "checkpoints" / "step-00000004"
    found = evaluated(cda, finished, older, "--cut", "top:1")["checkpoints"][1]
    cut = found["cuts"][0]
    assert cut["difference"] == pytest.approx(cut["bits_per_byte"] - found["bits_per_byte"])
    assert "(checkpoint 2)" in cda("eval", finished, older, "--cut", "top:1").out


def test_tokenizers_are_compared_by_document(cda: Cda, finished: Path, tiny: Path, documents: Path) -> None:
    """Their windows differ, and the bytes of a document do not."""
    other = finished.parent / "bpe"
    trained = cda("train", "--config", tiny, "--tokenizer", "bpe:300", "--steps", 2, "--out", other)
    assert trained.code == 0, trained.err
    assert_refused(cda("eval", finished, other), "different tokenizers", "--per-document")
    found = evaluated(cda, finished, other, "--data", documents, "--per-document", "--max-documents", 7)
    first, second = found["checkpoints"]
    assert second["tokens"] < first["tokens"] == first["text_bytes"] == second["text_bytes"]
    assert second["difference"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])
    assert found["resampled"]["unit"] == "documents"
    alone = evaluated(cda, other, "--data", documents, "--per-document", "--max-documents", 7)
    assert alone["bits_per_byte"] == pytest.approx(second["bits_per_byte"])


def test_positions_beyond_the_training_are_told_apart(cda: Cda, finished: Path, documents: Path) -> None:
    """The curve changes none of the figures, and the table has its numbers."""
    data = ("--data", documents, "--per-document", "--context", 64)
    found, plain = evaluated(cda, finished, *data, "--by-position"), evaluated(cda, finished, *data)
    ranges = found.pop("positions")
    assert found == plain
    assert [(one["first"], one["last"]) for one in ranges[-3:]] == [(9, 16), (17, 32), (33, 64)]
    mean = math.fsum(one["loss"] * one["tokens"] for one in ranges) / found["tokens"]
    assert mean == pytest.approx(found["loss"], rel=1e-6)
    shown = cda("eval", finished, *data, "--by-position").out
    assert "at most 64 tokens, disjoint; the training had 32" in shown
    assert f"{ranges[-1]['loss']:.4f} ± {ranges[-1]['standard_error']:.4f}" in shown


def test_calibration_is_shown_for_each_checkpoint(cda: Cda, finished: Path) -> None:
    older = finished / "checkpoints" / "step-00000004"
    found = evaluated(cda, finished, older, "--calibration")["checkpoints"]
    shown = cda("eval", finished, older, "--calibration").out
    for one in found:
        calibration = one["calibration"]
        assert f"{calibration['expected_calibration_error']:.4f}" in shown
        assert sum(each["tokens"] for each in calibration["bins"]) == one["tokens"]
        unused = [each for each in calibration["bins"] if not each["tokens"]]
        assert all(each["confidence"] is None for each in unused), "NaN is no JSON"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stride", "33"], "a window has 32; give 32 or less"),
        (["--per-document", "--max-batches", "2"], "give --max-documents"),
        (["--max-documents", "2"], "give --per-document with it"),
    ],
)
def test_what_has_no_meaning_is_refused(cda: Cda, finished: Path, arguments: list[str], words: str) -> None:
    assert_refused(cda("eval", finished, *arguments), words)


def test_another_context_must_be_named(cda: Cda, finished: Path, tiny: Path, tmp_path: Path) -> None:
    assert cda("train", "--config", tiny, "--seq-len", 16, "--steps", 2, "--out", tmp_path / "run").code == 0
    assert_refused(cda("eval", finished, tmp_path / "run"), "give both --context 16")
    found = evaluated(cda, finished, tmp_path / "run", "--context", 16)
    assert found["checkpoints"][0]["windows"] == found["checkpoints"][1]["windows"]
