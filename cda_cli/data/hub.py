"""The Hugging Face hub: an error is one clear sentence, and its libraries print nothing."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from cda_cli.data.files import file_errors
from cda_cli.errors import DataError, brief

REACH_SECONDS = 5.0


LOGGERS = ("datasets", "huggingface_hub", "fsspec", "urllib3")


class _QuietLibraries:
    """Silences the progress bars and log lines of libraries. Uses may overlap; the last one to end restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses = 0
        self._had_bars = False
        self._levels: dict[logging.Logger, int] = {}

    def begin(self) -> None:
        import datasets

        with self._lock:
            self._uses += 1
            if self._uses == 1:
                self._had_bars = not datasets.are_progress_bars_disabled()
                datasets.disable_progress_bars()
                self._levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
                for logger in self._levels:
                    logger.setLevel(logging.CRITICAL)

    def end(self) -> None:
        import datasets

        with self._lock:
            self._uses -= 1
            if self._uses == 0:
                for logger, level in self._levels.items():
                    logger.setLevel(level)
                if self._had_bars:
                    datasets.enable_progress_bars()


_quiet_libraries = _QuietLibraries()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the progress bars and log lines of `datasets` and of what it reads with, and restores them."""
    _quiet_libraries.begin()
    try:
        yield
    finally:
        _quiet_libraries.end()


@contextmanager
def offline_where_unreachable() -> Iterator[None]:
    """Inside, the hub's libraries take what they have cached, at once, if the hub does not answer.

    They would otherwise try five times for each file, with growing pauses, and fail only after up to minutes.
    """
    import datasets.config
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or _hub_answers(hub.ENDPOINT):
        yield
        return
    with _settings(hub, HF_HUB_OFFLINE=True), _settings(datasets.config, HF_HUB_OFFLINE=True):
        yield


@contextmanager
def _settings(module: ModuleType, **values: Any) -> Iterator[None]:
    """Sets constants of a module that a library reads as it runs, and that no argument sets."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def hub_file(repository: str, name: str) -> Path:
    """The local copy of a file of a hub repository, downloaded unless it is cached. Raises DataError."""
    import huggingface_hub

    with _hub_errors(repository, name):
        return Path(huggingface_hub.hf_hub_download(repository, name))


def hub_folder(repository: str, patterns: Sequence[str]) -> Path:
    """The local copy of those files of a hub repository that match one of `patterns`, as `hub_file` gives one.

    The name of the folder is the revision. Raises DataError.
    """
    import huggingface_hub

    with _hub_errors(repository, "copy"):
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))


@contextmanager
def _hub_errors(repository: str, wanted: str) -> Iterator[None]:
    """Turns the errors of the hub's library into a DataError each, whose remedy is a local `wanted`."""
    from huggingface_hub import errors

    try:
        with quiet_libraries(), offline_where_unreachable():
            yield
    except errors.HFValidationError as error:
        raise DataError(
            f"{repository!r} cannot be a name on the Hugging Face hub; give OWNER/NAME, or a local {wanted}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise DataError(
            f"the Hugging Face hub is out of reach and {repository} is not in its cache; connect to the network, or "
            f"give a local {wanted}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"the Hugging Face hub has no public {repository}; check the name, or log in to it") from error
    except errors.EntryNotFoundError as error:
        raise DataError(f"{repository} on the Hugging Face hub has no {wanted}; choose one that has") from error
    except read_errors() as error:
        raise DataError(f"{repository} cannot be fetched ({brief(error)}); give a local {wanted}") from error


def load_hub_dataset(name: str, configuration: str | None, *, streaming: bool) -> Any:
    """Every split of a hub dataset, as `datasets.load_dataset` gives them. Raises DataError."""
    import datasets

    try:
        with quiet_libraries(), offline_where_unreachable():
            return datasets.load_dataset(name, configuration, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"the Hugging Face hub has no public dataset {name}; check the name, or log in to it"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"the Hugging Face hub is out of reach and {name} is not in its cache; connect to the network, or give "
            "--data a local file"
        ) from error
    except read_errors() as error:
        raise DataError(f"the dataset {name} cannot be read ({brief(error)}); check hf:OWNER/NAME:CONFIG") from error


def read_errors() -> tuple[type[BaseException], ...]:
    """The errors that reading rows through `datasets` raises for bad files, formats and connections."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's error derives from that of its HTTP library, which differs between versions. `datasets` raises a
    # TypeError if a column changes its type.
    return (*file_errors(), TypeError, DatasetsError, *HfHubHTTPError.__bases__)


def _hub_answers(endpoint: str) -> bool:
    if urllib.request.getproxies():
        return True  # the proxy looks up the name, so a look-up here would say nothing
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=REACH_SECONDS).close()
    except OSError:
        return False
    return True
