"""Shows what the line editor of `cda sample` tells: a growing text, what else might stand there, and which keys were
read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cda_cli.console.base import out, print_pairs, print_trimmed, share, table
from cda_cli.console.text import print_sentence, write_text

if TYPE_CHECKING:
    from cda_cli.generation.draft import TokenProbabilities
    from cda_cli.generation.text import SampledText
    from cda_cli.inspection.read_keys import HeadRead

MEANINGS = {
    "Enter": "go on",
    "TEXT": "add it, and go on; a line that ends with \\ continues in the next one, and //TEXT adds /TEXT",
    "/undo": "take back what was added last, by you or by the model",
    "/retry": "take back what the model added last, and draw again",
    "/top [N]": "what else might stand in the place of token N, counted from the end, or of each of the last tokens",
    "/keys [N [LAYER]]": "which keys each head read to draw token N, or the last one",
    "/set [NAME VALUE]": "how to draw, such as /set temperature 0.5",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does; Ctrl-C ends what is being drawn",
}
KEY_COLUMNS = 18  # the width of a key in the table of keys
LAST_LINES = 6  # of a text that is shown again


def next_line() -> str | None:
    """Reads a line, which may hold newlines; None at the end. Ctrl-C begins it anew."""
    with contextlib.suppress(ImportError):  # Some builds of Python lack it.
        import readline  # noqa: F401 - `input` then lets one edit the line, and has a history

    lines: list[str] = []
    while True:
        try:
            lines.append(input("… " if lines else "> "))
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            lines.clear()
            continue
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1].removesuffix("\\")


def show_growing(text: str, samples: Iterable[SampledText]) -> None:
    """Writes the last line of `text`, and what is drawn after it as it comes."""
    console, written, sampled = out(), 0, None
    write_text(console, text[text.rfind("\n") + 1 :], style="dim")
    for sampled in samples:
        write_text(console, sampled.text[written:])
        written = len(sampled.text)
    write_text(console, "\n")
    if sampled is not None and sampled.finish_reason not in ("length", None):
        print_sentence(console, f"ended by {sampled.finish_reason}", style="dim")


def show_last_lines(text: str) -> None:
    """Writes the end of a text."""
    write_text(out(), "\n".join(text.split("\n")[-LAST_LINES:]) + "\n", style="dim")


def show_last_tokens(tokens: Sequence[TokenProbabilities]) -> None:
    """Shows tokens by their numbers, each with its probability and the likeliest in its place."""
    made = table("token", "", "probability", "likeliest")
    made.columns[1].justify = made.columns[3].justify = "left"
    for number, token, probability, likeliest in tokens:
        others = "  ".join(f"{other} {share(value)}" for other, value in likeliest)
        made.add_row(str(number), token, share(probability), others)
    print_trimmed(out(), made)


def show_probabilities(place: TokenProbabilities) -> None:
    """Shows the likeliest tokens in the place of one, and that one."""
    made = table(f"in place of token {place.number}", "probability")
    for token, probability in place.likeliest:
        made.add_row(token, share(probability), style="bold" if token == place.token else None)
    if place.token not in dict(place.likeliest):
        made.add_row(f"… {place.token}", share(place.probability), style="bold")
    print_trimmed(out(), made)


def show_keys(number: int, heads: Sequence[HeadRead], names: Sequence[str]) -> None:
    """Shows what each head read to draw token `number`. `names` are the tokens in front of it."""
    console = out()
    print_sentence(
        console,
        f"What each head read to draw token {number}: the largest weights λ, their keys, and how many tokens before it "
        "these stand; * is a capped weight.",
    )
    shown = max(1, min(len(heads[0].keys), (console.width - 14) // KEY_COLUMNS))
    made = table("head", "k", *(f"key {place}" for place in range(1, shown + 1)))
    for head in heads:
        cells = []
        for place, weight, is_capped in head.keys[:shown]:
            name = "null key" if place is None else f"{names[place]} {len(names) - place}"
            cells.append(f"{weight:.2f}{'*' if is_capped else ' '} {name}")
        made.add_row(f"{head.layer}.{head.head}", f"{head.sparsity_k:.3g}", *cells)
    for column in made.columns[2:]:
        column.justify, column.no_wrap = "left", True
    print_trimmed(console, made)


def show_editor_help() -> None:
    """Shows what one can type."""
    print_pairs(out(), MEANINGS)


def show_drawing(settings: Mapping[str, Any]) -> None:
    """Shows how the next tokens are drawn, as `/set` takes it."""
    print_pairs(out(), {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()})
