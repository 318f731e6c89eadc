"""A setting without meaning is refused in one sentence, with its remedy and exit code 2; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.helpers import Cda, assert_refused

RANGE = "greater than 0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attn-k", "0"], ["model.attn_k = 0", RANGE]),
        (["--attn-k", "-2"], ["model.attn_k = -2", RANGE]),
        (["--attn-k", "nan"], ["model.attn_k"]),
        (["--attn-k", "inf"], ["model.attn_k"]),
        (["--attn-k", "many"], ["model.attn_k = 'many'", "number"]),
        (["--ff-k", "0"], ["model.ff_k = 0", RANGE]),
        (["--eps", "0"], ["model.attn_eps = 0", RANGE]),
        (["--eps", "-1"], ["model.attn_eps = -1", RANGE]),
        (["--eps", "inf"], ["model.attn_eps"]),
        (["--set", "model.attn_eps=0"], ["model.attn_eps = 0", RANGE]),
        (["--set", "model.ff_eps=-0.1"], ["model.ff_eps = -0.1", RANGE]),
        (["--set", "model.attn_k=0"], ["model.attn_k = 0", RANGE]),
        (["--set", "model.dim=33"], ["model.dim 33 is not divisible by model.heads 2", "choose a multiple of 2"]),
        (["--set", "model.position=rotary", "--set", "model.dim_head=3"], ["even model.dim_head"]),
        (["--set", "model.ff_mult=0.01"], ["model.ff_mult"]),
        (["--set", "model.dmi=32"], ["unknown setting 'model.dmi'", "did you mean 'model.dim'?"]),
        (["--set", "modle.dim=32"], ["unknown section 'modle'", "did you mean 'model'?"]),
        (["--set", "model.zzzzz=1"], ["unknown setting 'model.zzzzz'"]),
        (["--set", "model"], ["section.key=value"]),
        (["--set", "model=3"], ["section.key"]),
        (["--set", "model.dim=[1"], ["not valid YAML"]),
        (["--set", "model.dim=wide"], ["model.dim = 'wide'", "integer"]),
        (["--set", "run.keep=1"], ["run.keep = 1"]),
        (["--preset", "tyni"], ["unknown preset 'tyni'", "did you mean 'tiny'?"]),
        (["--solver", "exat"], ["model.solver = 'exat'", "'exact' or 'iterative'"]),
        (
            ["--attention", "linear"],
            ["model.attention = 'linear'", "'softmax', 'coordinate-descent', 'tempered-softmax'"],
        ),
        (["--ff", "relu"], ["model.ff = 'relu'"]),
        (["--dtype", "f16"], ["run.dtype = 'f16'", "'float32' or 'bfloat16'"]),
        (["--backend", "cuda"], ["run.backend = 'cuda'", "'triton' or 'colt5'"]),
        (["--backend", "colt5"], ["no exact solver", "solver 'iterative' or backend 'torch'"]),
        (["--device", "cuda:99"], ["no device 'cuda:99'", "--device cpu"]),
        (["--device", "nonsense"], ["unknown device 'nonsense'", "auto, cpu, cuda"]),
        (["--device", "meta"], ["'meta' is not supported"]),
        (["--steps", "0"], ["optim.steps = 0"]),
        (["--lr", "0"], ["optim.lr = 0", RANGE]),
        (["--lr", "inf"], ["optim.lr"]),
        (["--lr", "1e39"], ["optim.lr"]),
        (["--seed", "-1"], ["run.seed = -1"]),
        (["--set", "run.seed=99999999999999999999"], ["run.seed"]),
        (["--grad-accum", "0"], ["optim.grad_accum = 0"]),
        (["--batch-size", "0"], ["optim.batch_size = 0"]),
        (["--seq-len", "1"], ["model.seq_len = 1"]),
        (["--resume", "sometimes"], ["sometimes does not exist"]),
        (["--tokenizer", "nowhere.json"], ["no tokenizer file nowhere.json", "--tokenizer bytes"]),
    ],
)
def test_training_is_refused(cda: Cda, tiny: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(cda("train", "--config", tiny, "--out", tmp_path / "run", *arguments), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("model: [", ["not valid YAML"]),
        ("just words", ["sections model, data, optim, run"]),
        ("model: null", ["section 'model'"]),
        ("model: {dmi: 3}", ["model.dmi", "model.dim"]),
        ("3: {dim: 3}", ["unknown section"]),
        ("preset: tyni", ["did you mean 'tiny'?"]),
        ("preset: 3", ["unknown preset"]),
        ("preset: [tiny]", ["preset"]),
        ("model: {dim: .inf}", ["model.dim"]),
        ("\0", ["YAML"]),
    ],
)
def test_a_file_of_settings_is_refused(cda: Cda, tmp_path: Path, yaml: str, words: list[str]) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(yaml, encoding="utf-8")
    assert_refused(cda("train", "--config", file, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_file_of_settings_that_cannot_be_read(cda: Cda, tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, word in (("nowhere.yaml", "no configuration file"), (".", "cannot be read"), ("bytes.yaml", "cannot")):
        assert_refused(cda("train", "--config", tmp_path / name, "--out", tmp_path / "run"), word, "--config")


@pytest.mark.parametrize("command", ["eval", "sample", "inspect-sparsity"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda:99"], ["no device 'cuda:99'", "--device cpu"]),
        (["--device", "nonsense"], ["unknown device 'nonsense'"]),
        (["--dtype", "float16"], ["unknown dtype 'float16'", "did you mean 'bfloat16'?"]),
        (["--backend", "colt5"], ["no exact solver"]),
        (["--backend", "cuda"], ["backend must be one of auto, torch, triton, colt5"]),
    ],
)
def test_reading_a_run_is_refused(
    cda: Cda, finished: Path, command: str, arguments: list[str], words: list[str]
) -> None:
    prompt = ["--prompt", "a"] if command == "sample" else []
    refused = cda(command, finished, *prompt, *arguments)
    assert_refused(refused, *words)
    assert refused.out == ""


@pytest.mark.parametrize("split", ["trian", "", "Train"])
def test_a_split_that_is_not_there(cda: Cda, finished: Path, split: str) -> None:
    assert_refused(cda("eval", finished, "--split", split), "unknown split")
