"""A run that was cut anywhere, and goes on in a fresh process, is to the last bit the run that was not."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cda_cli.config import Config
from tests.reliability import micro
from tests.reliability.fresh import train_afresh

VARIANT_STEPS = 12  # enough for what is broken to show


def cuts(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """60 steps killed right after each of the 59 (count: at a choice of them), each gone on from in a process of its
    own: the loss of every step, the weights, the moments, the random states and the position are equal."""
    chance, steps = random.Random(seed), VARIANT_STEPS if variant else micro.STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Every step is saved and kept, so that one run holds what a kill after any of its steps would leave.
        text = micro.mapped_text(folder)
        config = micro.settings(text, save_every=1, keep=steps)
        whole = folder / "whole"
        if fault := train_afresh(config, whole, folder / "cache", steps=steps, variant=variant):
            yield fault
            return
        for step in sorted(chance.sample(range(1, steps), min(count, steps - 1))):
            run = micro.copy_of_run(whole, folder / f"cut-{step}", step)
            fault = train_afresh(micro.settings(text), run, folder / "cache", steps=steps, variant=variant)
            fault = fault or micro.difference(run, whole)
            yield fault and f"cut after step {step}: {fault}"


def chains(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Chains of 3 to 5 resumes, each in a process of its own, of a streamed text and of a mapped one by turns; the cuts
    are stops by a signal and ends in good order."""
    chance, steps = random.Random(seed), VARIANT_STEPS if variant else micro.STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [micro.mapped_text(folder), micro.streamed_text(folder)]
        configs = [micro.settings(text, streaming=text.suffix == ".jsonl") for text in texts]
        wholes: dict[int, Path] = {}
        for number in range(count):
            kind = (number + 1) % 2
            if kind not in wholes:
                wholes[kind] = folder / f"whole-{kind}"
                if fault := train_afresh(configs[kind], wholes[kind], folder / "cache", steps=steps):
                    yield fault
                    return
            places = sorted(chance.sample(range(1, steps), chance.randint(3, 5)))
            signals = [chance.random() < 0.5 for _ in places]
            fault = chain(configs[kind], folder / f"chain-{number}", steps, places, signals, variant)
            fault = fault or micro.difference(folder / f"chain-{number}", wholes[kind])
            yield fault and f"{'streamed' if kind else 'mapped'}, cut after {places}: {fault}"


def chain(config: Config, run: Path, steps: int, places: list[int], signals: list[bool], variant: str) -> str | None:
    """Trains up to each of the places, and then to the end; what went wrong."""
    cache = run.parent / "cache"
    for step, by_signal in zip(places, signals, strict=True):
        end, stop_after = (steps, step) if by_signal else (step, None)
        if fault := train_afresh(config, run, cache, steps=end, stop_after=stop_after, variant=variant):
            return fault
    return train_afresh(config, run, cache, steps=steps, variant=variant)
