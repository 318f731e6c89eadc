"""`cda train` on a stream, and with a tokenizer of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cda_cli.storage import load, locate
from tests.commands.helpers import Cda, metrics, real_text


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A .jsonl file with a document a row."""
    path, text = tmp_path / "documents.jsonl", real_text()
    rows = [{"body": text[start : start + 100]} for start in range(0, len(text), 100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A tokenizer.json of 300 tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([real_text()], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_stream_trains_and_goes_on_where_it_was(cda: Cda, tiny: Path, lines: Path, tmp_path: Path) -> None:
    """A stream that starts anew after an interruption shows the model the same text twice."""
    settings = ("--data", lines, "--text-column", "body", "--streaming", "--set", "optim.schedule_steps=6")
    for name, cuts in (("whole", [6]), ("cut", [1, 4, 6])):
        for steps in cuts:
            run = ("train", "--config", tiny, *settings, "--out", tmp_path / name, "--steps", steps)
            result = cda(*run)
            assert result.code == 0, result.err
            assert "streamed" in result.out
    assert not (tmp_path / "cache").exists(), "a stream must not fill the cache"
    losses = [[record["loss"] for record in metrics(tmp_path / name, "train")] for name in ("whole", "cut")]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1], "the resumed stream saw other text"


def test_a_streamed_run_is_evaluated_and_inspected(cda: Cda, tiny: Path, lines: Path, tmp_path: Path) -> None:
    settings = ("--data", lines, "--text-column", "body", "--streaming", "--steps", 1)
    cda("train", "--config", tiny, *settings, "--out", tmp_path / "run")
    result = cda("eval", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["tokens"] > 32
    assert cda("inspect-sparsity", tmp_path / "run").code == 0
    refused = cda("eval", tmp_path / "run", "--split", "train")
    assert refused.code == 2
    assert "streamed" in refused.err


def test_a_tokenizer_travels_with_the_checkpoint(cda: Cda, tiny: Path, text: Path, bpe: Path, tmp_path: Path) -> None:
    """Without its tokenizer a model says nothing; the file that it came from may be gone."""
    run = tmp_path / "run"
    trained = cda("train", "--config", tiny, "--data", text, "--tokenizer", bpe, "--out", run, "--steps", 2)
    assert trained.code == 0, trained.err
    state = load(locate(run), parts=()).state
    assert state["config"]["model"]["vocab_size"] == 301, "300 tokens and a separator"
    ask = ("sample", run, "--prompt", "def ", "--max-new-tokens", 8, "--json")
    before = json.loads(cda(*ask).out)
    bpe.unlink()
    after = cda(*ask)
    assert after.code == 0, after.err
    assert json.loads(after.out) == before
    evaluated = json.loads(cda("eval", run, "--json").out)
    assert evaluated["bits_per_byte"] < evaluated["loss"] / 0.6931, "a token here stands for more than a byte"


def test_a_trained_tokenizer_stays_that_of_its_run(cda: Cda, tiny: Path, text: Path, tmp_path: Path) -> None:
    """A resumed run takes it from its checkpoint: bits and text stay, also where the cache is gone."""
    settings = ("train", "--config", tiny, "--data", text, "--tokenizer", "bpe:290", "--set", "optim.schedule_steps=4")
    for name, cuts in (("whole", [4]), ("cut", [2, 4])):
        for steps in cuts:
            result = cda(*settings, "--out", tmp_path / name, "--steps", steps)
            assert result.code == 0, result.err
            shutil.rmtree(tmp_path / "cache")
    whole, cut = (load(locate(tmp_path / name)) for name in ("whole", "cut"))
    assert whole.state["config"]["model"]["vocab_size"] == 290
    assert whole.tokenizer_json == cut.tokenizer_json
    assert all(tensor.equal(cut.model[key]) for key, tensor in whole.model.items())
    assert cda("eval", tmp_path / "cut").code == 0
    refused = cda("train", "--out", tmp_path / "cut", "--steps", 5, "--tokenizer", "bpe:291")
    assert refused.code == 2
    assert "holds another run (data.tokenizer is 'bpe:290' there and 'bpe:291' here)" in refused.err


def test_a_folder_resumes_by_its_text(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for number, part in enumerate(real_text().split("\n\n")[:40]):
        (folder / "deep" / f"{number:02}.py").write_text(part)
    run = ("train", "--config", tiny, "--data", folder, "--out", tmp_path / "run")
    first = cda(*run, "--steps", 1)
    assert first.code == 0, first.err
    assert "40 files" in first.out
    assert cda(*run, "--steps", 2).code == 0
    folder.rename(tmp_path / "elsewhere")
    gone = cda("eval", tmp_path / "run")
    assert (gone.code, "has gone; put it back" in gone.err) == (2, True)
    moved = cda("train", "--out", tmp_path / "run", "--steps", 3, "--data", tmp_path / "elsewhere")
    assert moved.code == 0, moved.err
    (tmp_path / "elsewhere" / "deep" / "00.py").write_text("another text")
    other = cda("train", "--out", tmp_path / "run", "--steps", 4, "--data", tmp_path / "elsewhere")
    assert (other.code, "is not what" in other.err) == (2, True)


def test_a_run_below_its_data_is_no_part_of_the_text(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """What the run writes would be read as text, and the run could not go on."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, part in enumerate(real_text().split("\n\n")[:40]):
        (folder / f"{number:02}.py").write_text(part)
    run = ("train", "--config", tiny, "--data", folder, "--out", folder / "runs" / "tiny")
    for steps in (1, 2):
        result = cda(*run, "--steps", steps)
        assert result.code == 0, result.err
        assert "40 files" in result.out
    assert "left out: 1 run" in result.out
    assert cda("eval", folder / "runs" / "tiny").code == 0
