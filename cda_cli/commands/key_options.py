"""The options that choose which cached keys are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cda_cli.errors import ConfigError

if TYPE_CHECKING:
    from cda_cli.model import KeySelection

AUTO = "auto"
TOLERANCE = 0.01

MaxKeysOption = Annotated[
    str | None,
    typer.Option(
        "--max-keys",
        metavar=f"{AUTO}|N",
        help="Read at most N cached keys (128 or more) for each token and head, in pages that may matter most; "
        f"{AUTO}: so few that no row leaves out more than --tolerance.",
        show_default="all keys",
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="SHARE",
        help=f"With --max-keys {AUTO}: the share of a row's weight that may be left out, below 1.",
        show_default=str(TOLERANCE),
    ),
]


def checked_selection(max_keys: str | None, tolerance: float | None) -> KeySelection | None:
    """Returns what the options choose, or None for all keys. Raises ConfigError for what has no meaning."""
    if max_keys != AUTO and tolerance is not None:
        raise ConfigError(
            f"--tolerance says how many keys --max-keys {AUTO} reads; give both, or leave --tolerance out"
        )
    if max_keys is None:
        return None
    from cda_cli.model import FIRST_AND_NEWEST, PAGE, KeySelection

    if max_keys == AUTO:
        share = TOLERANCE if tolerance is None else tolerance
        if not 0 <= share < 1:
            raise ConfigError(f"--tolerance is a share, 0 or more and below 1, not {share}")
        return KeySelection(None, share)
    least = FIRST_AND_NEWEST * PAGE
    if not (max_keys.isdecimal() and int(max_keys) >= least):
        raise ConfigError(
            f"--max-keys {max_keys!r} is not possible; give {AUTO}, or a number from {least} on, as the first and the "
            f"newest {PAGE} keys are always read"
        )
    return KeySelection(int(max_keys))
