"""One writer for a folder, by a lock of the operating system, which ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cda_cli.errors import StorageError

LOCK = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
# `is_held` takes the lock for an instant, which must refuse no writer.
TRIES, SECONDS_BETWEEN = 10, 0.02
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_writer(folder: Path, warn: Callable[[str], object]) -> Iterator[None]:
    """Holds `folder` for this process alone, and makes it if it is missing.

    On leaving, it removes the lock's file, and a folder that it made if that is still empty. Raises StorageError at
    once if another process holds the folder, or if the folder cannot be made. `warn` gets a sentence if the file system
    has no locks; nothing then keeps a second writer out.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    descriptor = _lock(folder / LOCK, warn)
    try:
        yield
    finally:
        # The file goes while the lock is held. Whoever opened it before finds that it is no longer in the folder.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def is_held(folder: Path) -> bool:
    """Whether a process holds `folder` now; False where the file system has no locks."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # An empty file is that of a writer that has not locked it yet.
        if os.read(descriptor, 1):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    finally:
        os.close(descriptor)
    return False


def _lock(file: Path, warn: Callable[[str], object]) -> int:
    """Locks `file` and returns its descriptor. The file says who holds it."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{file.parent} cannot be made ({error.strerror}); choose another --out") from error
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:
            continue  # another process has just given up this folder, and removed it
        except OSError as error:
            raise StorageError(f"{file} cannot be opened ({error.strerror}); choose another --out") from error
        try:
            _take(file, descriptor, warn)
            if _is_at(file, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{file} cannot be locked ({error.strerror}); choose another --out") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock_within(descriptor: int, tries: int) -> None:
    """Raises OSError if another process still holds the lock at the last of so many tries."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not left or error.errno not in _TAKEN:
                raise
            time.sleep(SECONDS_BETWEEN)
        else:
            return


def _take(file: Path, descriptor: int, warn: Callable[[str], object]) -> None:
    try:
        _lock_within(descriptor, TRIES)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            warn(f"{file.parent} is on a file system without locks; start no second run in it")
        elif error.errno in _TAKEN:
            holder = os.read(descriptor, 32).decode("ascii", errors="replace").strip()
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise StorageError(
                f"{file.parent} is being written by {who} (its lock is {file}); wait for it, or choose another --out"
            ) from error
        else:
            raise


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether the open file still has that name: its last holder may have removed it meanwhile."""
    opened = os.fstat(descriptor)
    if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
        raise StorageError(f"{file} is a link, or no file, and cda makes no such lock; remove it, if it is yours")
    try:
        return os.path.samestat(file.lstat(), opened)
    except FileNotFoundError:
        return False
