"""`cda import`: what it says, and that every other command takes the run that it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands.helpers import Cda, assert_refused, steps_saved
from tests.interchange.models import llama, randomised, save

WORDS = " ".join(f"w{number}" for number in range(93))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with a model card. Only to be read."""
    folder = save(randomised(llama()), tmp_path_factory.mktemp("model") / "llama")
    (folder / "README.md").write_text("---\nlanguage:\n- en\nlicense: apache-2.0\n---\n\n# A model\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})
    )
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That Llama as a run. Only to be read."""
    from tests.commands.helpers import run_cda

    folder = tmp_path_factory.mktemp("run") / "llama"
    result = run_cda("import", model, "--out", folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join([WORDS] * 20))
    return file


def test_what_was_imported_is_shown_and_recorded(cda: Cda, model: Path, tmp_path: Path) -> None:
    shown = cda("import", model, "--out", tmp_path / "one")
    assert shown.code == 0, shown.err
    for words in ("softmax", "llama", "apache-2.0", "64 tokens", "begins with <s>", "ends with </s>"):
        assert words in shown.out
    assert shown.err == ""
    told = json.loads(cda("import", model, "--out", tmp_path / "two", "--seq-len", 32, "--json").out)
    assert (told["architecture"], told["model"]["seq_len"]) == ("llama", 32)
    record = json.loads((tmp_path / "two" / "source.json").read_text())
    assert record["source"] == str(model)
    assert record["license"] == "apache-2.0"
    assert list(record["sha256"]) == ["model.safetensors"]
    assert len(record["sha256"]["model.safetensors"]) == 64
    settings = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())
    assert (settings["data"]["bos"], settings["data"]["eos"]) == ("<s>", "</s>")


def test_the_other_commands_take_the_run(cda: Cda, run: Path, text: Path) -> None:
    evaluated = cda("eval", run, "--data", text, "--json")
    assert json.loads(evaluated.out)["tokens"] == 20 * 93 + 1, evaluated.err  # <s> is no target, and </s> is one
    sampled = cda("sample", run, "--prompt", "w1 w2", "--max-new-tokens", 5, "--json")
    assert sampled.code == 0, sampled.err
    inspected = cda("inspect-sparsity", run, "--data", text, "--max-batches", 1, "--json")
    assert inspected.code == 0, inspected.err
    listed = json.loads(cda("runs", run, "--json").out)
    assert [(each["state"], each["faults"]) for each in listed["runs"]] == [("imported", [])]
    assert listed["problems"] == {}


def test_a_prompt_begins_as_the_documents_do(cda: Cda, model: Path, tmp_path: Path, text: Path) -> None:
    """The same prompt gives other text where nothing stands in front of it."""
    sampled = []
    for name, bos in (("with", "<s>"), ("without", "null")):
        made = cda("import", model, "--out", tmp_path / name, "--set", f"data.bos={bos}")
        assert made.code == 0, made.err
        result = cda("sample", tmp_path / name, "--prompt", "w1", "--temperature", 0, "--max-new-tokens", 12)
        sampled.append(result.out)
    assert sampled[0] != sampled[1]


def test_the_run_is_trained_on_any_text(cda: Cda, run: Path, text: Path, tmp_path: Path) -> None:
    """Its first checkpoint has the weights alone: no text and no optimizer with which the training must go on."""
    here = Path(shutil.copytree(run, tmp_path / "run"))
    before = load_file(here / "checkpoints" / "step-00000000" / "model.safetensors")
    options = ("--data", text, "--steps", 2, "--batch-size", 2, "--tokenizer", here / "tokenizer.json")
    trained = cda("train", "--out", here, *options)
    assert trained.code == 0, trained.err
    assert steps_saved(here) == [0, 2]
    assert json.loads(cda("runs", here, "--json").out)["runs"][0]["state"] == "finished"
    after = load_file(here / "checkpoints" / "step-00000002" / "model.safetensors")
    changes = {name: (after[name] - before[name]).abs().max().item() for name in before if before[name].numel()}
    assert 0 < max(changes.values()) < 1e-3, "the weights are not those that were imported"
    again = cda("train", "--out", here, *options[:2], "--steps", 3)
    assert again.code == 0, again.err
    (tmp_path / "other.txt").write_text(WORDS * 40)
    assert_refused(cda("train", "--out", here, "--data", tmp_path / "other.txt", "--steps", 4), "another --out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attention", "coordinate-descent"], ["model.attention", "another --out"]),
        (["--tokenizer", "bytes", "--set", "data.bos=null", "--set", "data.eos=null"], ["tokenizer"]),
        (["--set", "data.eos=null"], ["data.eos"]),
    ],
)
def test_the_run_keeps_its_model_and_its_tokens(
    cda: Cda, run: Path, text: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    """Other settings would train another model, or feed it numbers that mean other tokens, without a word."""
    here = Path(shutil.copytree(run, tmp_path / "run"))
    given = ["--data", text, "--steps", 2, "--batch-size", 2, "--tokenizer", here / "tokenizer.json"]
    given = given[:-2] if "--tokenizer" in options else given
    assert_refused(cda("train", "--out", here, *given, *options), *words)
    assert steps_saved(here) == [0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "hf:OWNER/NAME"]),
        (["published:nowhere"], ["nowhere", "safetensors"]),
        (["hf:"], ["'' cannot be a name on the Hugging Face hub", "OWNER/NAME"]),
        (["hf:owner/my name"], ["'owner/my name' cannot be a name on the Hugging Face hub", "OWNER/NAME"]),
        (["{model}", "--seq-len", "65"], ["--seq-len 64"]),
        (["{model}", "--attn-k", "-1"], ["attn_k"]),
        (["{model}", "--set", "model.depth=3"], ["model.layers.2"]),
        (["{model}", "--tokenizer", "nowhere.json"], ["nowhere.json"]),
        (["{model}", "--tokenizer", "bpe:300"], ["bpe:300", "tokenizer.json"]),
    ],
)
def test_a_wrong_call_is_one_sentence(
    cda: Cda, model: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    given = [argument.replace("{model}", str(model)) for argument in arguments]
    assert_refused(cda("import", *given, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_model_is_not_yet_a_run(cda: Cda, model: Path, tmp_path: Path, text: Path) -> None:
    """Whoever has a model and no run learns how to make one, at each command that takes a run."""
    gguf = tmp_path / "my model.gguf"
    gguf.touch()
    train = ("train", "--data", text, "--out", tmp_path / "run", "--init-from")
    for command, source in (
        ((*train,), model),
        ((*train,), "hf:owner/name"),
        (("sample", "--prompt", "w1"), gguf),
        (("export", "hf:owner/name"), tmp_path / "out"),
    ):
        said = cda(*command, source)
        assert_refused(said, "is a model of another tool; `cda import ", " --out RUN` makes a run of it")


def test_the_next_command_is_for_trained_weights(cda: Cda, model: Path, tmp_path: Path, text: Path) -> None:
    """The learning rate of a preset would undo them."""
    shown = cda("import", model, "--out", tmp_path / "run")
    command = next(line for line in shown.out.splitlines() if "--init-from" in line)
    given = command.replace("TEXT", str(text)).replace("RUN", str(tmp_path / "next")).split()[1:]
    assert cda(*given, "--steps", 1, "--batch-size", 2, "--seq-len", 16).code == 0
    settings = yaml.safe_load((tmp_path / "next" / "config.yaml").read_text())
    assert settings["optim"]["lr"] == 5e-5


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that is out of reach."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_taken_from_its_cache(cda: Cda, model: Path, hub: Path, tmp_path: Path) -> None:
    revision = "0123456789" * 4
    folder = hub / "models--owner--name"
    shutil.copytree(model, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    result = cda("import", "hf:owner/name", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "run" / "source.json").read_text())
    assert (record["source"], record["revision"]) == ("hf:owner/name", revision)


def test_a_hub_out_of_reach_is_one_sentence(cda: Cda, hub: Path, tmp_path: Path) -> None:
    result = cda("import", "hf:owner/name", "--out", tmp_path / "run")
    assert_refused(result, "hub is out of reach", "owner/name", "local")
    assert not (tmp_path / "run").exists()


def test_queries_keys_and_values_are_the_rows_of_one_matrix(run: Path, model: Path) -> None:
    ours = load_file(run / "checkpoints" / "step-00000000" / "model.safetensors")
    theirs = load_file(model / "model.safetensors")
    layer = "model.layers.1.self_attn"
    joined = torch.cat([theirs[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(ours["blocks.1.attention.to_qkv.weight"], joined)
