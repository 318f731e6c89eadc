"""A run so small that hundreds fit into a test, with everything that a resume must restore.

It has dropout, accumulation, an order of the data, a schedule, and passes that end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers

from cda_cli.config import Config, parse
from cda_cli.storage import locate
from tests.commands.helpers import real_text

STEPS = 60
THREADS = 2  # much goes wrong only between threads
MODEL = {
    "seq_len": 16, "dim": 16, "depth": 1, "heads": 2, "dropout": 0.1, "attn_k": 3.0, "learned_k": True, "null_kv": 1,
}  # fmt: skip
# So wide a head that two threads share the table of rotary positions: more than 2048 numbers, which PyTorch splits.
WIDE = MODEL | {"position": "rotary", "heads": 1, "dim_head": 260}
OPTIM = {"steps": STEPS, "schedule_steps": STEPS, "batch_size": 4, "grad_accum": 2, "warmup_steps": 5, "lr": 3e-3}
RUN = {
    "log_every": 1, "eval_every": 7, "eval_batches": 2, "save_every": 4, "sample_every": 0, "device": "cpu",
    "dtype": "float32",
}  # fmt: skip


def settings(text: Path, streaming: bool = False, model: Mapping[str, object] = MODEL, **run: object) -> Config:
    """Returns the settings of a micro run on `text`."""
    data = {"source": str(text), "streaming": streaming}
    return parse({"model": model, "data": data, "optim": OPTIM, "run": RUN | run})


def write_settings(path: Path, config: Config) -> Path:
    """Writes a file for `--config`."""
    path.write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    return path


def mapped_text(folder: Path, size: int = 6_000, repeats: int = 1) -> Path:
    """Writes one document. 60 steps of the micro run are more than one pass over it."""
    path = folder / "text.txt"
    path.write_text(real_text(size) * repeats, encoding="utf-8")
    return path


def streamed_text(folder: Path, size: int = 6_000) -> Path:
    """Writes the same text in documents of very different lengths."""
    text, documents, start = real_text(size), [], 0
    for length in [1, 700, 13, 60, 5, 240, 90, 3] * 20:
        documents.append(text[start : start + length])
        start += length
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents if one), encoding="utf-8")
    return path


def write_tokenizer(path: Path) -> Path:
    """Writes a byte-level tokenizer.json, so that a checkpoint has one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    return path


def losses(run: Path) -> dict[int, str]:
    """Returns the exact loss of each step."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"].hex() for record in records if record["kind"] == "train"}


def difference(run: Path, whole: Path) -> str | None:
    """Says in what a run differs, to the last bit, from the uninterrupted one."""
    found, wanted = losses(run), losses(whole)
    for step in sorted(found.keys() | wanted.keys()):
        if found.get(step) != wanted.get(step):
            return f"the loss of step {step} is {found.get(step)}, and {wanted.get(step)} without a cut"
    for name in sorted(file.name for file in locate(whole).glob("*.safetensors")):
        if (locate(run) / name).read_bytes() != (locate(whole) / name).read_bytes():
            return f"{name} differs at the end"
    before, now = (json.loads((locate(one) / "state.json").read_text())["position"] for one in (whole, run))
    return None if before == now else f"the position in the data is {now} at the end, and {before} without a cut"


def copy_of_run(run: Path, copy: Path, step: int | None = None) -> Path:
    """Copies a run. With `step` it keeps that checkpoint alone, as a kill right after it would."""
    shutil.copytree(run, copy, ignore=lambda folder, names: [n for n in names if step is not None and _other(n, step)])
    return copy


def _other(name: str, step: int) -> bool:
    return name.startswith("step-") and name != f"step-{step:08}"


def environment(cache: Path) -> dict[str, str]:
    """Of a process that trains: its threads, a cache of its own, this code."""
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS), "CDA_CACHE": str(cache)}
