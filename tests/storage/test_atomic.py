import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cda_cli.errors import ConfigError, StorageError
from cda_cli.storage.atomic import check_free, published_folder, remove_published, remove_stale, write_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "report.json"
    write_file(path, b"first")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"], "something was left beside the file"


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    """A run may come from a stranger, and a link in it would lead to another file."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"of somebody")
    link.symlink_to(file)
    write_file(link, b"new")
    assert (link.is_symlink(), link.read_bytes(), file.read_bytes()) == (False, b"new", b"of somebody")


def test_what_is_no_ordinary_file_stays_what_it_is(tmp_path: Path) -> None:
    """A device or a pipe, such as /dev/full: its name would become that of a file, for all programs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="pipe is no ordinary file; give the name of one"):
        write_file(pipe, b"text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_file_is_durable_before_its_name_is(tmp_path: Path, watch) -> None:
    done: list[tuple[str, str]] = []
    with watch(lambda event, path: done.append((event, path))):
        write_file(tmp_path / "report.json", b"content")
    order = [(event, path) for event, path in done if event in ("fsync", "os.rename")]
    assert [event for event, _ in order] == ["fsync", "os.rename", "fsync"]
    assert order[0][1] == order[1][1], "another file was fsynced than the one renamed"
    assert order[2][1] == str(tmp_path), "the folder was not fsynced after the rename"


def test_a_folder_is_durable_before_its_name_is(tmp_path: Path, watch) -> None:
    done: list[tuple[str, str]] = []
    target = tmp_path / "cache"
    with watch(lambda event, path: done.append((event, path))), published_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "a").write_bytes(b"a")
        (folder / "inner" / "b").write_bytes(b"b")
        assert not target.exists(), "the folder is visible before it is whole"
    order = [(event, path) for event, path in done if event in ("fsync", "os.rename")]
    files = {("fsync", str(folder / "a")), ("fsync", str(folder / "inner" / "b")), ("fsync", str(folder / "inner"))}
    assert files <= set(order[:3]), f"a file was not fsynced first: {order}"
    assert order[3:] == [("fsync", str(folder)), ("os.rename", str(folder)), ("fsync", str(tmp_path))]
    assert (target / "inner" / "b").read_bytes() == b"b"


def test_new_parents_are_made_durable(tmp_path: Path, watch) -> None:
    synced: list[str] = []
    with watch(lambda event, path: synced.append(path) if event == "fsync" else None):
        write_file(tmp_path / "run" / "logs" / "x", b"")
    assert {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "logs")} <= set(synced)


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), published_folder(tmp_path / "cache") as folder:  # noqa: PT012
        (folder / "half").write_bytes(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "dangling link"])
def test_what_exists_is_never_replaced_by_a_folder(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "cache"
    if kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        target.write_bytes(b"mine")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine").write_bytes(b"mine")
    with pytest.raises(StorageError, match="exists already; move it away"), published_folder(target):
        pytest.fail("the block ran")
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("name", ["empty", "link"])
def test_over_an_empty_folder_a_folder_is_whole_or_absent(tmp_path: Path, name: str) -> None:
    """A link to it stays, and so does the empty folder where the block fails."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    check_free(tmp_path / name)
    with pytest.raises(KeyError), published_folder(tmp_path / name, over_empty=True) as folder:  # noqa: PT012
        (folder / "half").write_bytes(b"half")
        raise KeyError
    assert list((tmp_path / "empty").iterdir()) == []
    with published_folder(tmp_path / name, over_empty=True) as folder:
        (folder / "whole").write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]
    assert (tmp_path / "link" / "whole").read_bytes() == b"whole"
    with pytest.raises(StorageError, match="exists already"), published_folder(tmp_path / name, over_empty=True):
        pytest.fail("the block ran")
    with pytest.raises(ConfigError, match=f"{name} is not empty; give the name of a new folder"):
        check_free(tmp_path / name)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, r"the disk is full \([0-9,.]+ MiB free"),
        (errno.EDQUOT, r"the disk is full \([0-9,.]+ MiB free"),
        (errno.EFBIG, r"raise the limit \(ulimit -f\)"),
        (errno.EACCES, "allow writing there"),
        (errno.EIO, "Input/output error; .* check the disk"),
    ],
)
def test_a_failed_write_is_one_sentence_with_the_remedy(tmp_path: Path, number: int, says: str) -> None:
    with pytest.raises(StorageError, match=says) as caught, published_folder(tmp_path / "cache"):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith(f"could not write {tmp_path / 'cache'}: ")
    assert "what was saved earlier is whole" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_every_failing_step_leaves_the_old_file_or_the_new(tmp_path: Path, watch) -> None:
    path = tmp_path / "report.json"
    failing = 0
    while True:
        path.write_bytes(b"old")
        calls = iter(range(1000))

        def fail(event: str, name: str, calls=calls, failing=failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        try:
            with watch(fail):
                write_file(path, b"new")
        except StorageError:
            assert path.read_bytes() in (b"old", b"new"), f"torn by a failure in operation {failing}"
            assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
            failing += 1
        else:
            break
    assert failing >= 5, "open, fsync, rename, open and fsync were not all made to fail"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"")
        with published_folder(tmp_path / "folder") as folder:
            (folder / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("file", "folder", "folder/private")}
    assert modes == {"file": 0o640, "folder": 0o750, "folder/private": 0o640}


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    elsewhere = tmp_path / "elsewhere"
    parent = tmp_path / "parent"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    parent.mkdir()
    stale = [f".tmp-cache-{dead.pid}-0123abcd", f".tmp-cache-{os.getpid()}-0123abcd", ".tmp-a-999999999-0123abcd"]
    for name in stale[:2]:
        (parent / name).mkdir()
        (parent / name / "half").touch()
    (parent / stale[2]).symlink_to(elsewhere)
    kept = {
        f".tmp-cache-{os.getppid()}-0123abcd",
        ".tmp-mine",
        "cache",
        ".tmp-cache-12-xyz",
        f"x.tmp-c-{dead.pid}-0123abcd",
    }
    for name in kept:
        (parent / name).mkdir()
    remove_stale(parent)
    remove_stale(tmp_path / "absent")
    assert {entry.name for entry in parent.iterdir()} == kept
    assert (elsewhere / "mine").exists(), "a leftover link was followed"


def test_a_failure_within_a_hidden_folder_names_the_folder_that_it_would_become(tmp_path: Path) -> None:
    says = f"could not write {tmp_path / 'run' / 'checkpoints' / 'step'}: the disk is full"
    with (
        pytest.raises(StorageError) as caught,
        published_folder(tmp_path / "run") as run,
        published_folder(run / "checkpoints" / "step"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value).startswith(says)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_published_without_what_a_killed_writer_of_it_left(tmp_path: Path) -> None:
    """The folder that a user names lies among others', whose leftovers are not ours to remove."""
    left = {name: tmp_path / f".tmp-{name}-999999999-0123abcd" for name in ("model", "model-2", "my-model")}
    for folder in left.values():
        folder.mkdir()
        (folder / "half").touch()
    with published_folder(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", left["model-2"].name, left["my-model"].name}


def test_a_removed_folder_is_hidden_before_it_loses_a_file(tmp_path: Path, watch) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "a").touch()
    done: list[tuple[str, str]] = []
    with watch(lambda event, path: done.append((event, path))):
        remove_published(folder)
    changes = [event for event, _ in done if event != "open"]
    assert changes == ["os.rename", "fsync", "os.remove", "os.rmdir"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_removed_stays_whole(tmp_path: Path, watch) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "a").touch()

    def refuse(event: str, path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with watch(refuse), pytest.raises(StorageError, match=r"could not remove .*cache: Permission denied"):
        remove_published(folder)
    assert (folder / "a").exists()
