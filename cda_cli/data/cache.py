"""The cache of what is made from the data: tokens, downloads and trained tokenizers.

An entry is a folder. It is written whole under another name and then renamed, so what is there is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from cda_cli.data.fingerprint import digest, stats
from cda_cli.errors import CdaError, StorageError
from cda_cli.storage import published_folder, remove_published, remove_stale

T = TypeVar("T")


class PreparationStoppedError(CdaError):
    """`should_stop` asked for an end. Nothing was left behind."""

    exit_code = 130


def cache_folder() -> Path:
    """$CDA_CACHE, else $XDG_CACHE_HOME/cda, else ~/.cache/cda."""
    if folder := os.environ.get("CDA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "cda"


@dataclass(frozen=True)
class Preparation:
    """How data is prepared: whether progress is shown, when to stop, and where new entries of the cache go.

    `spare_cache` takes the entries that are not in the cache yet, for a caller that must leave nothing behind. Of
    several processes that prepare the same data, `once` takes a key and a function, and returns what the function has
    returned where it was first called with that key.
    """

    show_progress: bool = False
    should_stop: Callable[[], bool] = lambda: False
    spare_cache: Path | None = None
    once: Callable[[str, Callable[[], str]], str] | None = None

    def of_content(self, what: str, paths: Sequence[Path], find: Callable[[], T]) -> T:
        """What `find` returns, plain JSON, which depends on the content of `paths` and on `what`. It may be known."""
        if self.once is None:
            return find()
        found: T = json.loads(self.once(digest(what, stats(paths)), lambda: json.dumps(find())))
        return found

    def bar(self, description: str, total: int | None) -> tqdm[Any]:
        """A progress bar that counts bytes up to `total`, if that is known."""
        return tqdm(
            total=total, desc=description, unit="B", unit_scale=True, disable=not self.show_progress, leave=False
        )

    def check(self) -> None:
        """Raises PreparationStoppedError once `should_stop()`."""
        if self.should_stop():
            raise PreparationStoppedError("stopped while preparing the data; run again to start it anew")

    def cached(
        self, kind: str, key: str, what: str, load: Callable[[Path], T | None], make: Callable[[Path], None]
    ) -> tuple[T, bool]:
        """What `load` finds in the entry `key` of a kind, and whether it was in the cache before.

        `make` fills a folder if `load` returns None: the entry is absent or damaged. If another process is first, its
        entry stays. `what` names the contents in errors. Raises StorageError if the cache cannot be written.
        """
        entry = cache_folder() / kind / key
        found = load(entry)
        if found is not None:
            return found, True
        if self.spare_cache is not None:
            entry = self.spare_cache / kind / key
            if (found := load(entry)) is not None:
                return found, False
        remove_stale(entry.parent)
        try:
            if os.path.lexists(entry):
                remove_published(entry)
            with published_folder(entry) as staging:
                make(staging)
        except StorageError as error:
            if load(entry) is None:
                raise StorageError(f"no {what}: {error}; CDA_CACHE can name another folder for them") from error
        found = load(entry)
        if found is None:
            raise StorageError(f"the {what} in {entry} vanished; run again, or set CDA_CACHE to another folder")
        return found, False
