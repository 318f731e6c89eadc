"""`cda eval`: its figures are those of the model and the text, computed here from the files alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cda_cli.config import parse
from cda_cli.model import Transformer
from cda_cli.storage import locate
from tests.commands.helpers import Cda, assert_refused, metrics

SEPARATOR = 0xFF


def sides(text: Path) -> dict[str, bytes]:
    """The text as training splits it: the last tenth of the characters is held out, with a separator at the end."""
    characters = text.read_text(encoding="utf-8")
    cut = round(len(characters) * 0.9)
    return {"train": characters[:cut].encode(), "validation": characters[cut:].encode() + bytes([SEPARATOR])}


@torch.no_grad()
def losses(run: Path, tokens: bytes) -> list[float]:
    """−ln p of each token but the first, with the context of its window: nats, one after another."""
    folder = locate(run)
    config = parse(json.loads((folder / "state.json").read_text())["config"]).model
    model = Transformer(config).eval()
    missing, unknown = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert (missing, unknown) == (["to_logits.weight"], []), "only the tied weight is left out"
    ids, T, found = torch.tensor(list(tokens)), config.seq_len, []
    for first in range(0, len(ids) - 1, T):
        last = min(first + T, len(ids) - 1)
        start = max(0, last - T)  # the last window reaches back, to be full
        predicted = model(ids[start:last].unsqueeze(0))[0].double().log_softmax(-1)
        found += [-predicted[place - 1 - start, ids[place]].item() for place in range(first + 1, last + 1)]
    return found


def evaluated(cda: Cda, *arguments: object) -> dict[str, Any]:
    result = cda("eval", *arguments, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("split", ["validation", "train", "all"])
def test_figures_are_those_of_the_model(cda: Cda, finished: Path, text: Path, split: str) -> None:
    """A window too few, a target counted twice, or a context that is cut changes the loss."""
    found, parts = evaluated(cda, finished, "--split", split), sides(text)
    chosen = list(parts.values()) if split == "all" else [parts[split]]
    each = [loss for tokens in chosen for loss in losses(finished, tokens)]
    mean = sum(each) / len(each)
    assert found["tokens"] == len(each)
    assert found["windows"] == sum(math.ceil((len(tokens) - 1) / 32) for tokens in chosen)
    assert found["loss"] == pytest.approx(mean, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    text_bytes = len(each) - (split != "train")  # the separator stands for none
    assert found["text_bytes"] == text_bytes
    assert found["bits_per_byte"] == pytest.approx(sum(each) / math.log(2) / text_bytes, rel=1e-6)
    assert (found["split"], found["checkpoint"]) == (split, str(locate(finished)))


def test_the_standard_error_is_that_of_windows(cda: Cda, finished: Path, text: Path) -> None:
    """Tokens of a window share their context: errors taken by token would be too small."""
    found, tokens = evaluated(cda, finished), sides(text)["validation"]
    each = losses(finished, tokens)
    windows = [each[start : start + 32] for start in range(0, len(each), 32)]
    mean, n = sum(each) / len(each), len(windows)
    variance = sum((sum(window) - mean * len(window)) ** 2 for window in windows) * n / (n - 1)
    assert found["standard_error"] == pytest.approx(math.sqrt(variance) / len(each), rel=1e-5)
    text_bytes = [*map(len, windows[:-1]), len(windows[-1]) - 1]
    nats = sum(each) / sum(text_bytes)
    pairs = zip(windows, text_bytes, strict=True)
    variance = sum((sum(window) - nats * size) ** 2 for window, size in pairs) * n / (n - 1)
    assert found["bits_per_byte_error"] == pytest.approx(math.sqrt(variance) / sum(text_bytes) / math.log(2), rel=1e-5)


def test_the_batch_size_does_not_matter(cda: Cda, finished: Path) -> None:
    """A mean of batch means would weigh the last, smaller batch too much."""
    documents = [evaluated(cda, finished, "--batch-size", size) for size in (1, 5, 64)]
    for other in documents[1:]:
        assert other["tokens"] == documents[0]["tokens"]
        assert other["windows"] == documents[0]["windows"]
        assert other["loss"] == pytest.approx(documents[0]["loss"], rel=1e-6)
        assert other["standard_error"] == pytest.approx(documents[0]["standard_error"], rel=1e-4)


def test_max_batches_is_the_beginning(cda: Cda, finished: Path, text: Path) -> None:
    found = evaluated(cda, finished, "--max-batches", 2, "--batch-size", 3)
    each = losses(finished, sides(text)["validation"])[: 6 * 32]
    assert (found["windows"], found["tokens"]) == (6, 6 * 32)
    assert found["loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert found["text_bytes"] == 6 * 32


def test_a_single_window_has_no_error(cda: Cda, finished: Path) -> None:
    """NaN is no JSON: a figure that does not exist is null."""
    found = evaluated(cda, finished, "--max-batches", 1, "--batch-size", 1)
    assert found["standard_error"] is None
    assert found["bits_per_byte_error"] is None
    shown = cda("eval", finished, "--max-batches", 1, "--batch-size", 1)
    assert "nan" not in shown.out


def test_another_text_is_evaluated_whole(cda: Cda, finished: Path, text: Path, tmp_path: Path) -> None:
    """The model has seen nothing of it, so nothing of it is held out; --split still takes a side."""
    other = tmp_path / "other.txt"
    other.write_text("Λ and λ: " * 200, encoding="utf-8")
    found, whole = evaluated(cda, finished, "--data", other), other.read_bytes() + bytes([SEPARATOR])
    assert (found["data"], found["split"]) == (str(other), "all")
    assert found == evaluated(cda, finished, "--data", other, "--split", "all")
    assert f"{other}, all" in cda("eval", finished, "--data", other).out
    for chosen, tokens in ((found, whole), *(
        (evaluated(cda, finished, "--data", other, "--split", split), part) for split, part in sides(other).items()
    )):  # fmt: skip
        each = losses(finished, tokens)
        assert (chosen["tokens"], chosen["text_bytes"]) == (len(tokens) - 1, len(tokens.rstrip(b"\xff")) - 1)
        assert chosen["loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert evaluated(cda, finished, "--data", text)["split"] == "validation", "the run's own text, though named"


@pytest.mark.parametrize("content", ["x", "λ", "the context is 32", "x" * 32, "x" * 33])
def test_a_text_shorter_than_the_context(cda: Cda, finished: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "short.txt").write_text(content, encoding="utf-8")
    found, tokens = evaluated(cda, finished, "--data", tmp_path / "short.txt"), content.encode() + bytes([SEPARATOR])
    each = losses(finished, tokens)
    assert (found["tokens"], found["windows"]) == (len(each), math.ceil(len(each) / 32))
    assert found["loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)
    shown = cda("inspect-sparsity", finished, "--data", tmp_path / "short.txt")
    assert shown.code == 0, shown.err
    assert f"{tmp_path / 'short.txt'}, all" in shown.out


def test_bytes_that_no_token_stands_for_are_not_counted(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A tokenizer that drops half of the text would halve the bits per byte of the other half."""
    import tokenizers
    from tokenizers import models

    vocabulary = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz \n")}
    tokenizers.Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "letters.json"))
    lines = [f"line {a}{b} of the text\n" for a in "abcdefghij" for b in "klmnopqrst"]
    found = {}
    for name, text in (("plain", "".join(lines)), ("mixed", "".join(f"{line}日本語の文\n" for line in lines))):
        (tmp_path / f"{name}.txt").write_text(text.replace("\n日", "日"), encoding="utf-8")
        data = ("--data", tmp_path / f"{name}.txt", "--tokenizer", tmp_path / "letters.json")
        trained = cda("train", "--config", tiny, *data, "--steps", 2, "--out", tmp_path / name)
        assert trained.code == 0, trained.err
        result = cda("eval", tmp_path / name, "--json", "--split", "all")
        assert ("the tokenizer loses" in trained.out) is ("the tokenizer loses" in result.err) is (name == "mixed")
        found[name] = json.loads(result.out)
        assert found[name]["bits_per_byte"] == pytest.approx(
            found[name]["loss"] * found[name]["tokens"] / math.log(2) / found[name]["text_bytes"]
        )
        for record in metrics(tmp_path / name, "train"):
            assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2)), "a letter is a byte"
    assert found["mixed"]["text_bytes"] == found["plain"]["text_bytes"] == len("".join(lines)) - 2
    told = cda("inspect-sparsity", tmp_path / "mixed").err
    assert told.startswith("the tokenizer loses 4"), told


def test_the_table_says_the_same(cda: Cda, finished: Path, text: Path) -> None:
    """What a person reads and what a program reads must not differ."""
    found, shown = evaluated(cda, finished), cda("eval", finished)
    assert shown.err == ""
    rows = {line[:14].strip(): line[14:].strip() for line in shown.out.splitlines()}
    assert rows["loss"] == f"{found['loss']:.4f} ± {found['standard_error']:.4f} nats per token"
    assert rows["bits per byte"] == f"{found['bits_per_byte']:.4f} ± {found['bits_per_byte_error']:.4f}"
    assert rows["perplexity"] == f"{found['perplexity']:.4g}"
    counted = f"{found['tokens']:,} in {found['windows']} windows, for {found['text_bytes']:,} bytes of text"
    assert rows["tokens"] == counted
    assert rows["data"] == f"{text}, validation"


def test_json_is_all_of_stdout(cda: Cda, finished: Path) -> None:
    """A word before or after the document breaks the program that reads it."""
    result = cda("eval", finished, "--json")
    assert result.err == ""
    document, end = json.JSONDecoder().raw_decode(result.out)
    assert result.out[end:] == "\n"
    assert set(document) == {
        "checkpoint", "data", "split", "loss", "standard_error", "perplexity", "bits_per_byte", "bits_per_byte_error",
        "tokens", "text_bytes", "windows", "context", "stride", "per_document", "counted", "resampled", "loss_interval",
        "bits_per_byte_interval", "bits_per_token", "bits_per_word", "words",
    }  # fmt: skip
    assert set(document["resampled"]) == {"unit", "number", "resamples", "seed", "level"}


def test_a_checkpoint_or_the_folder_of_them_can_be_named(cda: Cda, finished: Path) -> None:
    newest = evaluated(cda, finished)
    assert evaluated(cda, finished / "checkpoints") == newest
    older = evaluated(cda, finished / "checkpoints" / "step-00000004")
    assert older["checkpoint"].endswith("step-00000004")
    assert older["loss"] != newest["loss"], "two checkpoints gave the same model"


def test_bfloat16_is_close_and_not_the_same(cda: Cda, finished: Path) -> None:
    """An option that changes nothing is no option; one that changes much is a fault."""
    exact, rounded = evaluated(cda, finished), evaluated(cda, finished, "--dtype", "bfloat16")
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-2)


def test_nothing_is_written_to_the_run(cda: Cda, finished: Path) -> None:
    names = sorted(finished.rglob("*"))
    assert_refused(cda("eval", finished, "--split", "test"), "unknown split 'test'", "train", "validation")
    cda("eval", finished)
    assert sorted(finished.rglob("*")) == names


def test_cuts_are_compared_on_the_same_windows(cda: Cda, finished: Path) -> None:
    """All keys are no cut, and the table and the document show each cut."""
    found = evaluated(cda, finished, "--cut", "top:33,1", "--cut", "recent:1:drop")
    assert [(one["choice"], one["keys"], one["drops"]) for one in found["cuts"]] == [
        ("top", 33, False), ("top", 1, False), ("recent", 1, True),
    ]  # fmt: skip
    whole, cut, _ = found["cuts"]
    assert abs(whole["difference"]) < 1e-5 < abs(cut["difference"])
    assert cut["bits_per_byte"] - found["bits_per_byte"] == pytest.approx(cut["difference"])
    shown = cda("eval", finished, "--cut", "top:1").out
    assert f"{cut['difference']:+.4f}" in shown
    assert "top 1" in shown


def test_what_is_no_cut_is_refused(cda: Cda, finished: Path) -> None:
    assert_refused(cda("eval", finished, "--cut", "tip:3"), "did you mean 'top'")
