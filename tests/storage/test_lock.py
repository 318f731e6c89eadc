"""One writer for a folder. What two processes do to each other is in tests/reliability."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cda_cli.errors import StorageError
from cda_cli.storage import LOCK, is_held, only_writer

HOLDER = """
import sys
import threading
from pathlib import Path
from cda_cli.storage import only_writer
with only_writer(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_made_and_goes_again_if_nothing_came_in(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with only_writer(folder, pytest.fail):
        assert (folder / LOCK).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == [], "an error in the settings would leave an empty run"
    with only_writer(folder, pytest.fail):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_an_empty_folder_that_was_there_stays(tmp_path: Path) -> None:
    with only_writer(tmp_path, pytest.fail):
        pass
    assert tmp_path.is_dir()


def test_a_look_at_a_folder_tells_whether_it_is_held_and_changes_nothing(tmp_path: Path) -> None:
    """The file that a killed writer left holds nothing, and one that a writer has just made is let alone."""
    assert not is_held(tmp_path)
    with only_writer(tmp_path, pytest.fail):
        assert is_held(tmp_path)
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []
    for content in ("", "123\n"):
        (tmp_path / LOCK).write_text(content)
        assert not is_held(tmp_path)
        assert (tmp_path / LOCK).read_text() == content
    with (tmp_path / LOCK).open("w") as new:
        fcntl.flock(new, fcntl.LOCK_EX)
        assert not is_held(tmp_path), "a writer that does not have it yet would be refused"
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    assert not is_held(tmp_path)


def test_a_look_at_what_a_kill_has_left_refuses_no_writer(tmp_path: Path) -> None:
    """A look takes the lock for an instant, if the file names a process."""
    (tmp_path / LOCK).write_text("123\n")
    look = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [look]).start()
    with only_writer(tmp_path, pytest.fail):
        assert is_held(tmp_path)


def test_a_second_writer_is_told_who_holds_it_and_a_kill_frees_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=rf"written by process {holder.pid} .*\.lock.*; wait for it, or choose"):
            only_writer(tmp_path, pytest.fail).__enter__()
        assert (tmp_path / LOCK).read_text() == f"{holder.pid}\n", "the one who was refused changed the lock"
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with only_writer(tmp_path, pytest.fail):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    """The number of the process would go into the file that somebody else chose."""
    precious = tmp_path / "precious"
    precious.write_text("text")
    folder = tmp_path / "run"
    folder.mkdir()
    for link in (os.symlink, os.link):
        link(precious, folder / LOCK)
        with pytest.raises(StorageError, match=r"\.lock (is a link|cannot be opened)"):
            only_writer(folder, pytest.fail).__enter__()
        (folder / LOCK).unlink()
    os.mkfifo(folder / LOCK)
    with pytest.raises(StorageError, match=r"\.lock is a link, or no file"):
        only_writer(folder, pytest.fail).__enter__()
    assert precious.read_text() == "text"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/run cannot be made \(Not a directory\); choose another --out"):
        only_writer(tmp_path / "file" / "run", pytest.fail).__enter__()
