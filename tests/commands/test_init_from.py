"""`cda train --init-from`: a new run with the weights of another."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cda_cli.comparison.recorded import read_run
from cda_cli.config import ModelConfig, parse
from cda_cli.model import Transformer
from cda_cli.runs.folder import Run
from cda_cli.storage import Checkpoint, load, locate, unpack_optimizer
from cda_cli.training.optimizer import parameter_names
from tests.commands.helpers import Cda, assert_refused, contents, metrics, run_cda

STILL = ("--lr", "1e-30", "--set", "optim.weight_decay=0")  # steps that change no weight
SHORT = (*STILL, "--set", "run.eval_batches=1", "--eval-every", "0", "--device", "cpu")
ONE = (*SHORT, "--steps", "1")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A run with an average of its weights, an annealed ε, scaled positions and a tokenizer of its own.

    Only to be read.
    """
    folder = tmp_path_factory.mktemp("averaged")
    annealed = ("model.eps_anneal_start=2.0", "model.eps_anneal_share=1")
    scaled = ("model.rotary_scaling=yarn", "model.rotary_factor=2")
    settings = ("optim.ema_decay=0.5", "run.keep=3", *annealed, *scaled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        given = [part for setting in settings for part in ("--set", setting)]
        result = run_cda("train", "--config", tiny, "--tokenizer", "bpe:260", *given, "--out", folder / "run")
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("Another text, of other words altogether. " * 60, encoding="utf-8")
    return path


def newest(run: Path) -> Checkpoint:
    return load(locate(run))


def model_of(run: Path) -> ModelConfig:
    config = Run(run).config()
    assert config is not None
    return config.model


def assert_equal(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert not [name for name, tensor in tensors.items() if not tensor.equal(expected[name])]


def test_a_run_starts_from_the_weights_alone(cda: Cda, finished: Path, other_text: Path, tmp_path: Path) -> None:
    """The model's settings come along, although the preset has others. Nothing else of the source is left."""
    source, run = newest(finished), tmp_path / "run"
    done = cda("train", "--init-from", finished, "--data", other_text, "--out", run, "--seed", "7", *ONE)
    assert done.code == 0, done.err
    saved = newest(run)
    assert_equal(saved.model, source.model)
    assert model_of(run) == model_of(finished)
    assert saved.state["step"] == 1
    assert saved.state["tokens"] == 8 * 32, "the batch is that of the preset"
    assert saved.state["position"]["seed"] == 7
    assert f"starting from the weights of {source.path}, step 6" in " ".join(done.out.split())
    assert "parameters" not in done.out.partition("run ")[0], "all carried over, so none is named"


def test_the_run_records_what_it_started_from(cda: Cda, finished: Path, other_text: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", locate(finished)
    assert cda("train", "--init-from", finished, "--data", other_text, "--out", run, *ONE).code == 0
    sha256 = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    recorded = {"path": str(source), "from_step": 6, "file": "model.safetensors", "sha256": sha256}
    assert metrics(run, "init") == [{"step": 0, "kind": "init", **recorded}]
    config = Run(run).config()
    assert config is not None
    assert config.run.init_from == str(source)
    listed = json.loads(cda("runs", tmp_path, finished, "--json").out)
    assert "run.init_from" in listed["differing"]


def test_it_goes_on_without_the_source(
    cda: Cda, finished: Path, other_text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again does, with and without a file of settings, and so does one that only names the run."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished, source)
    monkeypatch.chdir(tmp_path)
    command = ("train", "--init-from", "source", "--data", other_text, "--out", run, "--seq-len", "16", *SHORT)
    assert cda(*command, "--steps", "1").code == 0
    shutil.rmtree(source)
    for step, again in enumerate([command, ("train", "--out", run), (*command, "--config", tiny)], 2):
        done = cda(*again, "--steps", step)
        assert done.code == 0, done.err
        assert newest(run).state["step"] == step
    assert len(metrics(run, "init")) == 1
    assert model_of(run).seq_len == 16


def test_a_run_that_began_otherwise_is_refused(
    cda: Cda, finished: Path, averaged: Path, text: Path, tmp_path: Path
) -> None:
    """It would go on from its own weights, not from those that the command names."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(run)
    words = ("did not begin from", "another --out", "leave --init-from out")
    for other in (averaged, run):
        assert_refused(cda("train", "--init-from", other, "--data", text, "--out", run), *words)
    again = ("train", "--init-from", averaged, "--data", text, "--resume", finished, "--out", tmp_path / "new")
    assert_refused(cda(*again), str(locate(finished)), *words)
    assert contents(run) == before


def test_the_average_is_taken_where_there_is_one(cda: Cda, averaged: Path, other_text: Path, tmp_path: Path) -> None:
    source = newest(averaged)
    assert not all(tensor.equal(source.ema[name]) for name, tensor in source.model.items())
    for wanted, part in ((True, source.ema), (False, source.model)):
        run = tmp_path / f"run {wanted}"
        chosen = ("--set", f"run.init_ema={str(wanted).lower()}")
        done = cda("train", "--init-from", averaged, "--data", other_text, "--out", run, *ONE, *chosen)
        assert done.code == 0, done.err
        assert_equal(newest(run).model, part)
        assert ("moving average" in done.out) == wanted
        assert metrics(run, "init")[0]["file"] == ("ema.safetensors" if wanted else "model.safetensors")


def test_the_tokenizer_comes_from_the_source(cda: Cda, averaged: Path, other_text: Path, tmp_path: Path) -> None:
    """The merges are those of the source, although the run trains on another text. The same tokenizer may be named."""
    run, source = tmp_path / "run", locate(averaged)
    command = ("train", "--init-from", averaged, "--data", other_text, *SHORT)
    for steps in (1, 2):
        done = cda(*command, "--out", run, "--steps", steps)
        assert done.code == 0, done.err
        assert newest(run).tokenizer_json == newest(averaged).tokenizer_json
    command = (*command, "--steps", "1")
    for other in ("bytes", "bpe:300"):
        assert_refused(cda(*command, "--tokenizer", other, "--out", tmp_path / "no"), "bpe:260", f"--tokenizer {other}")
    assert not (tmp_path / "no").exists() or not any((tmp_path / "no").glob("[!.]*"))
    named = ("--tokenizer", source / "tokenizer.json", "--set", "data.bos=<|endoftext|>")
    done = cda(*command, *named, "--out", tmp_path / "named")
    assert done.code == 0, done.err
    shown = json.loads(cda("config", "--init-from", tmp_path / "named", "--json", "data").out)["settings"]
    values = {one["key"]: one["value"] for one in shown}
    assert values["data.tokenizer"] == str(source / "tokenizer.json")
    assert (values["data.bos"], values["data.eos"]) == ("<|endoftext|>", None)


def test_the_temperature_is_that_of_the_step(cda: Cda, averaged: Path) -> None:
    """A model that was trained down to some ε would start anew from the first one."""
    middle = averaged / "checkpoints" / "step-00000002"
    shown = cda("config", "--init-from", middle, "--json", "model.attn_eps", "model.eps_anneal_start")
    values = {one["key"]: one for one in json.loads(shown.out)["settings"]}
    final = model_of(averaged).attn_eps
    assert values["model.attn_eps"]["value"] == pytest.approx(2.0 ** (1 - 2 / 6) * final ** (2 / 6))
    assert values["model.eps_anneal_start"]["value"] is None
    assert values["model.attn_eps"]["from"] == f"weights {middle}"


def test_the_scaling_of_positions_stays_in_a_longer_context(cda: Cda, averaged: Path) -> None:
    """It would be another one if its original context were the new one."""
    shown = json.loads(cda("config", "--init-from", averaged, "--seq-len", "64", "--json", "rotary").out)["settings"]
    values = {one["key"]: one["value"] for one in shown}
    assert (values["model.rotary_scaling"], values["model.rotary_original_len"]) == ("yarn", 32)
    assert model_of(averaged).rotary_original_len is None


def test_a_token_that_the_weights_do_not_know_is_refused(
    cda: Cda, averaged: Path, other_text: Path, tmp_path: Path
) -> None:
    """A tokenizer whose ending token has a name of its own gets another one where the settings name none."""
    text = newest(averaged).tokenizer_json
    assert text is not None
    file, source = tmp_path / "tokenizer.json", tmp_path / "source"
    file.write_text(text.replace("<|endoftext|>", "<|im_end|>"), encoding="utf-8")
    named = ("--tokenizer", file, "--set", "data.eos=<|im_end|>")
    done = cda("train", "--data", other_text, "--out", source, *named, "--seq-len", "16", *ONE)
    assert done.code == 0, done.err
    again = ("train", "--init-from", source, "--data", other_text, "--set", "data.eos=null")
    assert_refused(cda(*again, "--out", tmp_path / "run", *ONE), "the weights know 260 tokens", "leave data.eos")


def test_a_preset_gives_all_but_the_model(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """A file, --set and flags win over the source, which wins over the preset."""
    file = tmp_path / "settings.yaml"
    file.write_text("model: {attn_k: 5}\n", encoding="utf-8")
    given = ("--preset", "small", "--config", file, "--set", "model.seq_len=24", "--attention", "hard-topk")
    shown = json.loads(cda("config", "--init-from", finished, *given, "--json").out)
    config = {one["key"]: one["value"] for one in shown["settings"]}
    changes = {"attn_k": 5.0, "seq_len": 24, "attention": "hard-topk"}
    model = {key: config[f"model.{key}"] for key in ModelConfig.model_fields}
    assert model == model_of(finished).model_dump() | changes
    small = json.loads(cda("config", "--preset", "small", "--json", "optim").out)["settings"]
    assert all(config[one["key"]] == one["value"] for one in small)


def test_another_attention_rule_names_what_is_new_and_what_is_dropped(
    cda: Cda, finished: Path, other_text: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    plain = ("--attention", "softmax", "--fixed-k", "--set", "model.null_kv=0")
    done = cda("train", "--init-from", finished, "--data", other_text, "--out", first, *plain, *ONE)
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert "attention coordinate-descent → softmax" in words
    assert "no place for: blocks.0–1.attention.null_kv, blocks.0–1.attention.to_learned_k.weight, " in words
    rich = ("--attention", "coordinate-descent", "--learned-k", "--set", "model.output_gate=true")
    done = cda(
        "train", "--init-from", first, "--data", other_text, "--out", second, *rich, *ONE, "--set", "model.null_kv=2"
    )
    assert done.code == 0, done.err
    new = " ".join(done.out.split()).partition("new parameters, as the model initialises them: ")[2]
    for name in ("null_kv", "to_learned_k.weight", "to_learned_k.bias", "to_gate.weight", "to_gate.bias"):
        assert f"blocks.0–1.attention.{name}" in new
    before, after = newest(first).model, newest(second).model
    assert all(tensor.equal(after[name]) for name, tensor in before.items() if tensor.numel())
    bias = after["blocks.0.attention.to_learned_k.bias"]
    assert bias.eq(model_of(second).learned_k_bias).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.dim=64"], ["token_embedding.weight has shape (256, 32)", "leave the sizes"]),
        (["model.ff_mult=2"], ["feed_forward", "leave the sizes"]),
        (["model.heads=4"], ["2 × 16", "4 × 8", "model.heads"]),
        (["model.null_kv=2"], ["null_kv", "leave the sizes"]),
    ],
)
def test_another_shape_is_refused_before_any_work(
    cda: Cda, finished: Path, other_text: Path, tmp_path: Path, cache: Path, settings: list[str], words: list[str]
) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "run"
    assert_refused(cda("train", "--init-from", finished, "--data", other_text, "--out", out, *given, *ONE), *words)
    assert not contents(cache)
    assert not (out / "config.yaml").exists()


@pytest.mark.parametrize("named", ["nothing", "text"])
def test_what_is_no_run_is_refused(cda: Cda, text: Path, tmp_path: Path, named: str) -> None:
    path = text if named == "text" else tmp_path / named
    assert_refused(cda("train", "--init-from", path, "--data", text, "--out", tmp_path / "run"), str(path))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_carries_over(cda: Cda, finished: Path, other_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = cda("train", "--init-from", finished, "--data", other_text, "--out", out, "--dry-run", "--seq-len", "16")
    assert done.code == 0, done.err
    assert "seq_len 32 → 16" in done.out
    assert not out.exists()


def test_settings_of_an_earlier_version_name_no_weights() -> None:
    assert parse({"run": {"seed": 3}}).run.init_from is None


def test_a_fork_that_changes_nothing_is_the_run_itself(cda: Cda, finished: Path, tiny: Path, tmp_path: Path) -> None:
    """To the bit: it has the steps, the optimizer, the random numbers and the order of the data."""
    source = finished / "checkpoints" / "step-00000004"
    done = cda("train", "--config", tiny, "--init-from", source, "--set", "run.fork=true", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert f"going on from {source}, step 4, as a fork" in " ".join(done.out.split())
    fork, whole = newest(tmp_path / "run"), newest(finished)
    assert_equal(fork.model, whole.model)
    assert_equal(fork.optimizer, whole.optimizer)
    assert fork.state["tokens"] == whole.state["tokens"]
    records = metrics(tmp_path / "run", "train")
    assert [record["step"] for record in records] == [5, 6]
    assert metrics(tmp_path / "run", "init")[0]["step"] == 4
    of_its_own = sum(128 / record["tokens_per_second"] for record in records)
    assert read_run(tmp_path / "run").seconds == pytest.approx(of_its_own), "the time of the source is not its own"


def test_a_fork_goes_on_with_the_moving_average(cda: Cda, averaged: Path, tiny: Path, tmp_path: Path) -> None:
    source = averaged / "checkpoints" / "step-00000004"
    config = averaged / "config.yaml"
    given = ("--config", config, "--tokenizer", "bpe:260", "--init-from", source, "--set", "run.fork=true")
    done = cda("train", *given, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    fork, whole = newest(tmp_path / "run"), newest(averaged)
    assert_equal(fork.model, whole.model)
    assert_equal(fork.ema, whole.ema)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fork_may_have_another_model(cda: Cda, tiny: Path, tmp_path: Path, optimizer: str) -> None:
    """Parameters that both have keep their moments, and new ones begin without."""
    kind = ("--set", f"optim.optimizer={optimizer}")
    given = ("train", "--config", tiny, *kind, "--eval-every", 0)
    trunk = ("--steps", 2, "--set", "optim.schedule_steps=3", "--set", "model.qk_norm=false")
    assert cda(*given, *trunk, "--out", tmp_path / "trunk").code == 0
    fork = ("--init-from", tmp_path / "trunk", "--set", "run.fork=true", "--steps", 3, "--set", "model.qk_norm=true")
    done = cda(*given, *fork, "--out", tmp_path / "fork")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "settings of the optimizer that differ from theirs: steps 2 → 3, schedule_steps 3 → null" in said, said
    saved = newest(tmp_path / "fork")
    config = Run(tmp_path / "fork").config()
    assert config is not None
    with torch.device("meta"):
        names = parameter_names(Transformer(config.model), config.optim)
    state = unpack_optimizer(saved.optimizer, saved.state["optimizer"])
    moments = (state if optimizer == "muon" else {"adamw": state})["adamw"]["state"]
    steps = {name: int(moments[index]["step"]) for index, name in enumerate(names.parts["adamw"])}
    new = {name for name in steps if "query_norm" in name or "key_norm" in name}
    assert new
    assert steps == {name: 1 if name in new else 3 for name in steps}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", 1], "run.seed 0 and not 1"),
        (["--steps", 4], "has done 4 steps"),
        (["--set", "optim.optimizer=muon"], "optim.optimizer adamw and not muon"),
        (["--seq-len", 16], "model.seq_len 32 and not 16"),
    ],
)
def test_a_fork_with_other_data_is_refused(
    cda: Cda, finished: Path, tiny: Path, tmp_path: Path, change: list[object], words: str
) -> None:
    source = finished / "checkpoints" / "step-00000004"
    fork = ("train", "--config", tiny, "--init-from", source, "--set", "run.fork=true", "--out", tmp_path / "run")
    assert_refused(cda(*fork, *change), words)


def test_a_fork_of_nothing_is_refused(cda: Cda, tmp_path: Path) -> None:
    assert_refused(cda("train", "--set", "run.fork=true", "--out", tmp_path / "run"), "run.init_from names")
