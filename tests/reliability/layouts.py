"""Runs of several processes, in each layout, that are cut and resumed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.reliability import micro
from tests.reliability.harness import become_cda, become_rank, exit_code, free_port, start
from tests.reliability.variants import broken

# The processes and the layout. More than two of them, unlike two, add up a gradient in one of several orders.
LAYOUTS: tuple[tuple[int, str, str], ...] = (
    (2, "--parallel", "fsdp"),
    (2, "--parallel", "cp"),
    (4, "--parallel", "ddp"),
    (4, "--mesh", "dp=2,cp=2"),
    (4, "--parallel", "cp"),
    (4, "--parallel", "fsdp"),
)
STEPS = 5


def cuts(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Kills a run right after any of its steps but the last, and resumes it in the same layout, for each by turns.

    The loss of every step, the weights, the moments, the random states of each process and the position must be equal.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = micro.settings(micro.mapped_text(folder), save_every=1, keep=STEPS)
        settings = micro.write_settings(folder / "settings.yaml", config)
        for trial in range(count):
            number = trial % len(LAYOUTS)
            processes, *layout = LAYOUTS[number]
            command = ["train", "--config", settings, *layout, "--steps", STEPS, "--out"]
            whole, run, step = folder / f"whole-{number}", folder / f"cut-{trial}", chance.randrange(1, STEPS)
            if not whole.exists() and (fault := train_together(processes, [*command, whole], folder)):
                yield fault
                return
            micro.copy_of_run(whole, run, step)
            fault = train_together(processes, [*command, run], folder, variant) or micro.difference(run, whole)
            yield fault and f"{processes} processes with {' '.join(layout)}, cut after step {step}: {fault}"


def train_together(processes: int, arguments: list[object], folder: Path, variant: str = "") -> str | None:
    """Runs `cda ARGUMENTS` in processes that meet as those of torchrun do, and says what went wrong."""
    port, said = free_port(), folder / "said"
    children = [start(take_part, rank, processes, port, variant, arguments, said) for rank in range(processes)]
    codes = [exit_code(child) for child in children]
    return f"training ended with {codes}: {said.read_text()[-2000:]}" if any(codes) else None


def take_part(rank: int, processes: int, port: int, variant: str, arguments: list[object], said: Path) -> None:
    become_rank(rank, processes, port)
    with broken(variant):
        become_cda(arguments, said.parent / "cache", said)
