"""Writes that a reader sees whole or not at all, whatever kills the writer and whenever.

    write into a hidden sibling → fsync the files → fsync their folder → rename → fsync the parent

A rename within one folder is atomic, so a reader meets the old state or the new one. The fsyncs keep that order
through a power loss: without them a file system may make the name durable before the content. Promised for local
file systems; network ones have their own rules. A hidden sibling is called `.tmp-NAME-<pid>-<random>`, and nothing
reads it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from cda_cli.errors import ConfigError, StorageError

_HIDDEN = re.compile(r"\.tmp-(.+)-([1-9][0-9]{0,8})-[0-9a-f]{8}", re.DOTALL)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_device_or_pipe(path: Path) -> bool:
    """Whether `path` is there, and neither a file nor a folder."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, replacing the file that is there. Of a link it replaces the link, not what that names.

    Raises StorageError if the write fails. The earlier file is then as it was. Raises ConfigError for a device or a
    pipe, whose name would then be that of a file.
    """
    path = Path(path)
    if is_device_or_pipe(path):
        raise ConfigError(f"{path} is no ordinary file; give the name of one")
    with explained("write", path):
        _make_folder(path.parent)
        temporary = _hidden_sibling(path)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            _discard(temporary)
            raise
        _fsync(path.parent)


@contextlib.contextmanager
def published_folder(path: Path, *, over_empty: bool = False) -> Iterator[Path]:
    """Yields a hidden folder to fill. If the block ends well, the folder becomes `path`, which must not exist before.

    With `over_empty` an empty folder, or a link to one, may be there: the new folder takes its place.

    On any exception, an interrupt included, the hidden folder is removed and `path` stays absent. What a killed writer
    of `path` left is removed first. The block should only write: an OSError in it counts as a failed write and becomes
    a StorageError.
    """
    path = Path(path).resolve() if over_empty else Path(path)
    with explained("write", path):
        _refuse_existing(path, over_empty)
        _make_folder(path.parent)
        remove_stale(path.parent, path.name)
        temporary = _hidden_sibling(path)
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            # A rename would replace an empty folder without a word.
            _refuse_existing(path, over_empty)
            temporary.rename(path)
        except BaseException:
            _discard(temporary)
            raise
        _fsync(path.parent)


def check_free(path: Path) -> None:
    """Raises ConfigError unless `path` is absent or an empty folder, where `published_folder` may write over it."""
    if os.path.lexists(path) and not _is_empty_folder(path):
        taken = "is not empty" if path.is_dir() else "is a file"
        raise ConfigError(f"{path} {taken}; give the name of a new folder")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def remove_published(path: Path) -> None:
    """Removes a published folder (or a file or link in its place) so that no moment shows a part of it.

    Raises StorageError if it cannot be removed. It is then still whole.
    """
    path = Path(path)
    hidden = _hidden_sibling(path)
    with explained("remove", path):
        path.rename(hidden)
        # Otherwise a power loss could bring back the name over a half-emptied folder.
        _fsync(path.parent)
    _discard(hidden)


def remove_stale(parent: Path, name: str | None = None) -> None:
    """Removes what killed writers left in `parent`: every hidden sibling, or those of `name`, whose process is gone.

    A sibling of this very process counts as left over, because a restarted container often hands out the same
    number again. One process therefore writes one thing into a folder at a time. What cannot be removed stays; it
    only costs space.
    """
    with contextlib.suppress(OSError):
        for entry in list(Path(parent).iterdir()):
            match = _HIDDEN.fullmatch(entry.name)
            if match and name in (None, match[1]) and not _another_process_lives(int(match[2])):
                _discard(entry)


def is_hidden(name: str) -> bool:
    """Whether a name belongs to a hidden sibling, of a write that is running or was cut short."""
    return _HIDDEN.fullmatch(name) is not None


def _hidden_sibling(path: Path) -> Path:
    return path.parent / f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def _another_process_lives(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refuse_existing(path: Path, over_empty: bool) -> None:
    if os.path.lexists(path) and not (over_empty and _is_empty_folder(path)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _make_folder(path: Path) -> None:
    """Like `mkdir -p`, with every new name made durable."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _fsync(path.parent)


def _settle(folder: Path) -> None:
    """Makes a tree durable from the leaves up, with the modes that the umask asks for."""
    # `mkdir` obeyed the umask. Reading the umask itself would set it for every thread.
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(root, name)
            file.chmod(mode)  # safetensors leaves 0600
            _fsync(file)
        _fsync(Path(root))


def sync(path: Path) -> None:
    """Makes the content of a file durable."""
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(hidden: Path) -> None:
    """Removes a hidden sibling as far as possible. `remove_stale` takes the rest another time."""
    with contextlib.suppress(OSError):
        if hidden.is_dir() and not hidden.is_symlink():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink()


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turns an OSError within it into a StorageError that names the remedy. A hidden `path` is named as it will be."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"could not {verb} {_as_named(path)}: {_reason_and_remedy(error, path)}") from error


def _as_named(path: Path) -> Path:
    """The path that a person knows, also of a write within a hidden folder."""
    found = ((_HIDDEN.fullmatch(part), part) for part in path.parts)
    return Path(*(match[1] if match else part for match, part in found))


def _reason_and_remedy(error: OSError, path: Path) -> str:
    whole = "what was saved earlier is whole, checkpoints included"
    if error.errno in _FULL:
        return f"the disk is full ({_free_space(path)}); {whole}; free some space and run the command again"
    if error.errno == errno.EFBIG:
        return f"a file grew past the size limit of this shell; {whole}; raise the limit (ulimit -f) and run again"
    if error.errno == errno.EEXIST:
        return "something of that name exists already; move it away or choose another folder"
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _FORBIDDEN:
        return f"{reason}; {whole}; allow writing there or choose another folder"
    return f"{reason}; {whole}; check the disk and run the command again"


def _free_space(path: Path) -> str:
    """The space that is free once the unfinished write is gone."""
    try:
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free without this write"
    except OSError:
        return "how much is free cannot be read"
