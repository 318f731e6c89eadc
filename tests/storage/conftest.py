"""What the storage tests share: a small state to save, and a watch over what the process does to files."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

Handler = Callable[[str, str], None]

# An audit hook cannot be taken away again, so one is installed for good and asks here whom to tell.
_handlers: list[Handler] = []
_WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _handlers and event in _WATCHED and isinstance(args[0], (str, bytes, os.PathLike)):
        for handler in _handlers:
            handler(event, os.fsdecode(args[0]))


sys.addaudithook(_audit)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], object]:
    """`with watch(handler):` calls `handler(event, path)` before each file operation; it may raise to make it fail."""
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        for handler in _handlers:
            handler("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched_fsync)

    @contextmanager
    def watching(handler: Handler) -> Iterator[None]:
        _handlers.append(handler)
        try:
            yield
        finally:
            _handlers.remove(handler)

    return watching


def _contents(step: int, size: int = 50) -> dict[str, object]:
    """Arguments of `publish` whose tensors differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    shared = torch.randn(size, generator=generator)
    return {
        "step": step,
        "model": {"tied.a": shared, "tied.b": shared, "null_kv": torch.zeros(2, 4, 0, 8)},
        "optimizer": {"state.0.step": torch.tensor(float(step)), "state.0.exp_avg": shared * 0.1},
        "rng": {"cpu": generator.get_state()},
        "state": {"step": step, "loss": 0.1 + step, "config": {"model": {"width": 8}}},
        "tokenizer_json": '{"version": "1.0"}',
    }


@pytest.fixture(scope="session")
def contents() -> Callable[..., dict[str, object]]:
    return _contents
