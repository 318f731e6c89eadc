"""A run that was cut anywhere, and resumed in a fresh process, equals the uninterrupted run to the last bit."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cda_cli.config import Config
from tests.reliability import micro
from tests.reliability.fresh import train_afresh

VARIANT_STEPS = 12  # enough for what is broken to show
ON_CPU: dict[str, object] = {}  # as the micro run is
ON_GPU: dict[str, object] = {"device": "cuda", "dtype": "bfloat16", "compile": False, "deterministic": True}


def cuts(
    count: int, seed: int, variant: str = "", device: Mapping[str, object] = ON_CPU, at_once: int = 1
) -> Iterator[str | None]:
    """Kills 60 steps right after each of the 59 (or `count` of them), and resumes each in a process of its own.

    The loss of every step, the weights, the moments, the random states and the position must be equal. On a CPU each
    resume is in a new interpreter, and the uncut run, which starts one no more, in a fork.
    """
    chance, steps = random.Random(seed), VARIANT_STEPS if variant else micro.STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Every step is saved and kept, so that one run holds what a kill after any of its steps would leave.
        text = micro.mapped_text(folder)
        config = micro.settings(text, model=micro.WIDE, save_every=1, keep=steps, **device)
        whole = folder / "whole"
        if fault := train_afresh(config, whole, folder / "cache", steps=steps, variant=variant, forked=True):
            yield fault
            return

        def fault_of(step: int) -> str | None:
            run = micro.copy_of_run(whole, folder / f"cut-{step}", step)
            again = micro.settings(text, model=micro.WIDE, **device)
            fault = train_afresh(again, run, folder / "cache", steps=steps, variant=variant)
            fault = fault or micro.difference(run, whole)
            return fault and f"cut after step {step}: {fault}"

        with ThreadPoolExecutor(at_once) as threads:
            yield from threads.map(fault_of, sorted(chance.sample(range(1, steps), min(count, steps - 1))))


def chains(
    count: int, seed: int, variant: str = "", device: Mapping[str, object] = ON_CPU, at_once: int = 1
) -> Iterator[str | None]:
    """Chains of 3 to 5 resumes, each in a process of its own, of a streamed text and of a mapped one by turns; the cuts
    are stops by a signal and ends in good order. On a CPU the processes are forked: `cuts` has new interpreters."""
    chance, steps = random.Random(seed), VARIANT_STEPS if variant else micro.STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A broken variant is caught with the streamed text, which is the first.
        texts = [micro.streamed_text(folder), micro.mapped_text(folder)][: 1 if variant else count]
        configs = [
            micro.settings(text, streaming=text.suffix == ".jsonl", model=micro.WIDE, **device) for text in texts
        ]
        wholes = [folder / f"whole-{text.stem}" for text in texts]
        for config, whole in zip(configs, wholes, strict=True):
            if fault := train_afresh(config, whole, folder / "cache", steps=steps, forked=True):
                yield fault
                return
        plans = []
        for _ in range(count):
            places = sorted(chance.sample(range(1, steps), chance.randint(3, 5)))
            plans.append((places, [chance.random() < 0.5 for _ in places]))

        def fault_of(number: int) -> str | None:
            kind, (places, signals), run = number % len(texts), plans[number], folder / f"chain-{number}"
            fault = chain(configs[kind], run, steps, places, signals, variant) or micro.difference(run, wholes[kind])
            return fault and f"{texts[kind].name}, cut after {places}: {fault}"

        with ThreadPoolExecutor(at_once) as threads:
            yield from threads.map(fault_of, range(count))


def chain(config: Config, run: Path, steps: int, places: list[int], signals: list[bool], variant: str) -> str | None:
    """Trains up to each of the places, and then to the end, and says what went wrong."""
    cache = run.parent / "cache"
    for step, by_signal in zip(places, signals, strict=True):
        end, stop_after = (steps, step) if by_signal else (step, None)
        if fault := train_afresh(config, run, cache, steps=end, stop_after=stop_after, variant=variant, forked=True):
            return fault
    return train_afresh(config, run, cache, steps=steps, variant=variant, forked=True)
