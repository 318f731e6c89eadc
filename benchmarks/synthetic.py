"""What the benchmarks share: random tokens in place of a text, `cda` as a process, and tables with their provenance."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cda_cli.config import Config, resolve
from cda_cli.data import Tokens, TrainBatches, load_tokenizer
from cda_cli.sweep.student_t import mean_of
from cda_cli.training.distributed.processes import ALONE, Processes
from cda_cli.training.state import RunData

VOCABULARY = 50304  # GPT-2's, rounded up to a multiple of 64
TOKENS = 2**22
SOFTMAX = ("model.attention=softmax", "model.learned_k=false")
ATTENTION = {"softmax": SOFTMAX, "coordinate-descent": ()}


def settings(preset: str, sets: Sequence[str] = ()) -> Config:
    """Returns the settings of a preset with GPT-2's vocabulary."""
    return resolve(preset=preset, sets=[f"model.vocab_size={VOCABULARY}", *sets])


def on_gpu(wanted: Sequence[str] = (), known: Collection[str] = ()) -> list[str]:
    """Returns the names to measure: those `wanted`, or all that are `known`.

    It ends the program if a name is unknown, or if there is no GPU.
    """
    program = f"benchmarks/{Path(sys.argv[0]).name}"
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"{program} has no {', '.join(unknown)}; it has {', '.join(known)}")
    if not torch.cuda.is_available():
        sys.exit(f"{program} measures on a CUDA device, and there is none")
    return [name for name in known if not wanted or name in wanted]


def random_data(config: Config, processes: Processes = ALONE) -> RunData:
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, TOKENS, dtype=np.uint16)
    tokens = Tokens(ids, np.full(TOKENS, 4, np.uint8), text_bytes=4 * TOKENS)
    seq_len, share = config.model.seq_len, processes.share(config.optim)

    def open_batches(position: Any) -> TrainBatches:
        return TrainBatches(tokens, seq_len, share.size, 0, position, share.rows)

    return RunData(load_tokenizer("bytes"), tokens, "random tokens", TOKENS // seq_len, None, open_batches)


def cda(*arguments: object) -> str:
    """Runs a command and returns what it printed. Raises RuntimeError, with its stderr, if it fails."""
    done = subprocess.run([sys.executable, "-m", "cda_cli", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cda {' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean of `values`, one for each seed; None for fewer than two."""
    return None if len(values) < 2 else (found := mean_of(values)).high - found.value


def row(*cells: object) -> None:
    """Prints a line of a table, numbers with three decimals."""
    print(
        "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def header(title: str, *columns: str) -> None:
    """Prints the head of a table: its title, its provenance as in benchmarks/results/, and its columns."""
    print(f"\n## {title}\n")
    for name, value in provenance().items():
        print(f"- {name}: {value}")
    print(flush=True)
    row(*columns)
    print("|---|" + "---:|" * (len(columns) - 1), flush=True)


def provenance() -> dict[str, str]:
    """Returns what is needed to reproduce a table: date, machine, versions, commit and command."""
    packages = {"PyTorch": torch.__version__, "Python": platform.python_version()}
    if importlib.util.find_spec("triton"):
        packages["Triton"] = importlib.metadata.version("triton")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "commit": commit(),
        "command": f"`{shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`",
    }


def machine() -> str:
    """Describes the GPUs of this machine, or its CPU with the number of threads that PyTorch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, threads: {torch.get_num_threads()}"


def commit() -> str:
    """Returns the commit of this code: “with changes” if files differ from it, “unknown” outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty= with changes"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
