"""Sends an exported folder to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from cda_cli.data.hub import quiet_libraries
from cda_cli.errors import ConfigError, StorageError, brief


def check_push(repository: str | None, dry_run: bool) -> None:
    """Raises ConfigError for a name that no repository can have, and for a dry run without one."""
    if dry_run and repository is None:
        raise ConfigError("--dry-run lists what --push-to would send; give --push-to OWNER/NAME")
    if repository is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("an owner is missing")
    except HFValidationError as error:
        raise ConfigError(f"--push-to takes OWNER/NAME, not {repository!r}") from error


def push(folder: Path, repository: str) -> str:
    """Makes the repository unless it is there, sends the files of `folder` in one commit, and returns its address.

    Raises StorageError where the hub is out of reach, or refuses. The folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's error derives from that of its HTTP library, which differs between versions.
    refused: tuple[type[BaseException], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        with quiet_libraries():
            api = HfApi()
            api.create_repo(repository, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by cda")
            return f"{api.endpoint}/{repository}"
    except refused as error:
        raise StorageError(
            f"{repository} was not sent ({brief(error)}); {folder} is whole: run `hf auth login`, check the network, "
            f"and {how_to_send(folder, repository)}"
        ) from error


def how_to_send(folder: Path, repository: str) -> str:
    """How a person sends a folder that was exported."""
    return f"send it with `hf upload {repository} {shlex.quote(str(folder))}`"
