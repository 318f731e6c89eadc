"""A signal at any moment, or a stdout that can no longer be written: the run saves and goes, and no step is lost."""

from __future__ import annotations

import functools
import os
import pty
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from cda_cli.storage import newest
from tests.reliability import micro
from tests.reliability.harness import FORKS, become_cda, exit_code, start
from tests.reliability.moments import Moments, Within
from tests.reliability.variants import broken

DEADLINE = 10.0  # seconds from the first signal to the end of the process
VARIANT_DEADLINE = 3.0  # for a variant, which would only make the tests wait
STEPS = 12
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOST = ("closed pipe", "full disk", "closed terminal")

# Where the signal falls: within the so many-th call of a function.
PHASES = {
    "preparing": ("cda_cli.data.prepare", "prepare", 1),
    "building": ("cda_cli.training.setup", "build", 1),
    "the first step": ("cda_cli.training.gradients", "accumulate_gradients", 1),
    "a later step": ("cda_cli.training.gradients", "accumulate_gradients", 6),
    "evaluating": ("cda_cli.training.loop", "validate", 1),
    "saving": ("cda_cli.storage.checkpoint", "publish", 2),
    "figures": ("cda_cli.training.pipeline", "inspect_first", 3),
}
VARIANT_PHASES = ("a later step", "evaluating", "saving")
BEFORE_THE_RUN = ("preparing", "building")


class Shot(NamedTuple):
    """A signal at a moment of a phase, and possibly a second one after so many more calls.

    With SIGPIPE it is a stdout that is `lost` from that moment on.
    """

    phase: str
    moment: int
    number: int
    again_after: int | None = None
    second: int = 0
    lost: str = ""


def lose_stdout(lost: str) -> None:
    """Makes each write fail with EPIPE, ENOSPC or EIO."""
    if lost == "full disk":
        into = os.open("/dev/full", os.O_WRONLY)
    else:
        other_end, into = os.pipe() if lost == "closed pipe" else pty.openpty()
        os.close(other_end)
    os.dup2(into, 1)


def train_and_shoot(arguments: list[object], cache: Path, shot: Shot, variant: str, said: Connection) -> None:
    """Trains in a child that sends itself the signals, and says when it did."""

    def shoot() -> None:
        said.send(time.monotonic())
        if shot.again_after is None:
            moments.__exit__()
        else:
            moments.act_again(shot.again_after, lambda: os.kill(os.getpid(), shot.second))
        if shot.lost:
            lose_stdout(shot.lost)
        else:
            os.kill(os.getpid(), shot.number)

    moments = Moments(Within(*PHASES[shot.phase]), shot.moment, shoot)
    with broken(variant), moments:
        become_cda(arguments, cache, cache.parent / "said")


def train_and_count(arguments: list[object], cache: Path, said: Connection) -> None:
    """Trains in a child, and says how many moments each phase had."""
    phases = {phase: Within(*where) for phase, where in PHASES.items()}
    seen = dict.fromkeys(PHASES, 0)

    def wait(frame: FrameType, event: str, arg: Any) -> None:
        for phase in phases:
            if phases[phase].begins(frame):
                sys.settrace(None)
                sys.setprofile(functools.partial(count, phase))

    def count(phase: str, frame: FrameType, event: str, arg: Any) -> None:
        seen[phase] += phases[phase](frame, event, arg)
        if phases[phase].over:
            sys.setprofile(None)
            sys.settrace(wait)

    sys.settrace(wait)
    try:
        become_cda(arguments, cache, cache.parent / "said")
    finally:
        said.send(seen)


def fault_of(shot: Shot, arguments: list[object], cache: Path, run: Path, variant: str) -> str | None:
    """Says what went wrong with a run that was shot at."""
    listener, said = FORKS.Pipe(duplex=False)
    child = start(train_and_shoot, arguments, cache, shot, variant, said)
    said.close()
    try:
        shot_at = listener.recv()
    except EOFError:
        return f"the run ended with {exit_code(child)} before it was shot at"
    deadline = VARIANT_DEADLINE if variant else DEADLINE
    code = exit_code(child, max(0.0, shot_at + deadline - time.monotonic()))
    if code != 128 + shot.number:
        return f"no end within {deadline} s" if code is None else f"the exit code is {code}"
    if shot.phase in BEFORE_THE_RUN:
        # A second signal may cut the cleaning up short; what is left is hidden, and goes with the next run.
        visible = run.exists() and shot.again_after is None
        hidden = [] if shot.again_after else [str(path) for path in cache.rglob(".tmp-*")]
        return f"the run's folder or {hidden} is left" if visible or hidden else None
    done = max(micro.losses(run), default=0)
    found, passed_over = newest(run)
    reached = int(found.name.removeprefix("step-")) if found else -1
    return f"step {done} was done, and {reached} is saved ({passed_over})" if passed_over or reached < done else None


def signals(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Sends a signal at random moments of each phase, from the preparation of the data to the middle of a save.

    A second signal follows half of them. Then the same command goes on, and ends as a run that nobody stopped.
    """

    def shot(phase: str, moments: int, chance: random.Random) -> Shot:
        again_after = chance.randrange(2_000) if chance.random() < 0.5 else None
        return Shot(phase, chance.randrange(moments), chance.choice(SIGNALS), again_after, chance.choice(SIGNALS))

    return shots(count, seed, variant, list(PHASES), shot)


def lost_output(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Does the same with a stdout whose reader, disk or terminal goes away once the run has begun."""

    def shot(phase: str, moments: int, chance: random.Random) -> Shot:
        return Shot(phase, chance.randrange(moments), signal.SIGPIPE, lost=chance.choice(LOST))

    return shots(count, seed, variant, [phase for phase in PHASES if phase not in BEFORE_THE_RUN], shot)


def shots(
    count: int, seed: int, variant: str, phases: list[str], choose: Callable[[str, int, random.Random], Shot]
) -> Iterator[str | None]:
    """Yields trials, one phase after another. `choose` gets a phase and the number of its moments."""
    chance = random.Random(seed)
    phases = phases if not variant else list(VARIANT_PHASES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = micro.mapped_text(folder, 30_000, repeats=100)
        # It evaluates for long only where the signal falls there: who does not ask for it then is late.
        quick, long = (settings_file(folder, text, batches) for batches in (2, 10**6))
        whole, cache = folder / "run", folder / "cache"
        moments = count_moments(command(quick, whole), cache)
        for trial in range(count):
            phase = phases[trial % len(phases)]
            shot = choose(phase, moments[phase], chance)
            apart = folder / f"trial-{trial}"
            apart.mkdir()
            tokens = apart / "cache" if phase == "preparing" else cache
            # A lost stdout is seen when something is printed, which an evaluation does at its end.
            settings = long if phase == "evaluating" and not shot.lost else quick
            fault = fault_of(shot, command(settings, apart / "run"), tokens, apart / "run", variant)
            fault = fault or fault_after(command(quick, apart / "run"), tokens, apart, whole)
            yield fault and f"{shot}: {fault}"


def settings_file(folder: Path, text: Path, eval_batches: int) -> Path:
    config = micro.settings(text, eval_every=5, eval_batches=eval_batches)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"steps": STEPS})})
    return micro.write_settings(folder / f"evaluating-{eval_batches}.yaml", config)


def command(settings: Path, run: Path) -> list[object]:
    return ["train", "--config", settings, "--out", run]


def count_moments(arguments: list[object], cache: Path) -> dict[str, int]:
    """Counts the moments of each phase, in a run that is not shot at."""
    listener, said = FORKS.Pipe(duplex=False)
    child = start(train_and_count, arguments, cache, said)
    said.close()
    try:
        seen: dict[str, int] = listener.recv()
    except EOFError:
        seen = {}
    assert exit_code(child) == 0, (cache.parent / "said").read_text()
    assert all(seen.values()), f"a phase was not met: {seen}"
    return seen


def fault_after(arguments: list[object], cache: Path, folder: Path, whole: Path) -> str | None:
    """Says whether the same command then ends as the run that nobody stopped."""
    code = exit_code(start(become_cda, arguments, cache, folder / "said"))
    if code != 0:
        return f"going on ended with {code}: {(folder / 'said').read_text()[-500:]}"
    difference = micro.difference(folder / "run", whole)
    return difference and f"after going on, {difference}"
