"""Kills a process that does nothing but save, with SIGKILL, at moments counted in its own file operations."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from cda_cli.storage.checkpoint import load, newest, publish

KILLS = 20

# Imports once and forks a saver for each folder it reads, since the import costs more than the test. A saver writes
# its process id, then a dot before every file operation and a P after every save.
_SAVERS = """
import os, sys
from pathlib import Path
import torch
from cda_cli.storage.checkpoint import newest, publish

torch.set_num_threads(1)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run = Path(line.strip())
        path = newest(run)[0]
        step = int(path.name[5:]) if path else 0
        os.write(1, f"{os.getpid()}\\n".encode())
        sys.addaudithook(lambda event, args: event.startswith(("os.", "open")) and os.write(1, b"."))
        while True:
            step += 1
            part = {"w": torch.full((50_000,), float(step))}
            publish(run, step=step, model=part, optimizer=part, rng=part, state={"step": step})
            os.write(1, b"P")
    os.waitpid(pid, 0)
    os.write(1, b"D")
"""


def _kill_after(server: "subprocess.Popen[bytes]", run: Path, count: int) -> int:
    """Lets a saver run for `count` operations, kills it, and returns how many saves it said were done."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{run}\n".encode())
    server.stdin.flush()
    pid = int(server.stdout.readline())
    said = b""
    while len(said) < count:
        byte = os.read(server.stdout.fileno(), 1)
        assert byte, "the saver ended by itself"
        said += byte
    os.kill(pid, signal.SIGKILL)
    while not said.endswith(b"D"):
        byte = os.read(server.stdout.fileno(), 1)
        assert byte, "the saver ended by itself"
        said += byte
    return said.count(b"P")


def test_no_kill_loses_a_published_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    step = 0
    interrupted = 0
    command = [sys.executable, "-c", _SAVERS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as server:
        for kill in range(KILLS):
            count = chance.randrange(1, 250)
            saved = _kill_after(server, tmp_path, count)
            found, passed_over = newest(tmp_path)
            place = f"kill {kill}, {count} operations after the start"
            assert passed_over == [], f"{place}: a damaged checkpoint looks published: {passed_over}"
            reached = int(found.name[5:]) if found else 0
            assert reached >= step + saved, f"{place}: step {step + saved} was saved, {reached} is the newest"
            if found:
                assert load(found).model["w"].eq(reached).all(), f"{place}: wrong values"
            step = reached
            interrupted += any(entry.name.startswith(".tmp-") for entry in (tmp_path / "checkpoints").glob(".*"))
        assert server.stdin is not None
        server.stdin.close()
    assert interrupted >= KILLS // 4, "hardly a kill fell into a save, so this test showed nothing"
    publish(tmp_path, step=step + 1, model={}, optimizer={}, rng={}, state={})
    left = [entry.name for entry in (tmp_path / "checkpoints").iterdir() if entry.name.startswith(".")]
    assert left == [], "leftovers of the killed were not removed"
