"""Writes the page: template, style and script of this folder, with the figures and the rows of a report in them.

report → JSON │ rows and thumbnails → base64 of raw deflate │ both in the template → one file, written whole

The streams lie in script elements that no browser runs, and the script unpacks those of a head when it is opened.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cda_cli.errors import ConfigError
from cda_cli.inspection import OF_BUDGET, LiveHead, Report, RowStore
from cda_cli.inspection.row_codes import deflate
from cda_cli.inspection.store import thumbnail_side
from cda_cli.page.meanings import ABLATION, MEANINGS
from cda_cli.storage import write_file
from cda_cli.strict_json import dumps
from cda_cli.version import __version__

# In this order the modules can be joined: each imports only from those before it.
SCRIPTS = (
    "dom",
    "theme",
    "state",
    "store",
    "charts",
    "download",
    "grid",
    "map",
    "text",
    "live",
    "head",
    "overview",
    "main",
)
DIGITS = 5  # of a figure
# What the file takes besides rows and thumbnails: itself, for each head its figures, and for each token its text.
FILE_BYTES = 120_000
HEAD_BYTES = 6_000
TOKEN_BYTES = 16


def bytes_for_rows(budget: int, heads: int, tokens: int) -> int:
    """The bytes that a store of rows may take for a page of at most `budget` bytes.

    Raises ConfigError if so many heads and tokens do not fit.
    """
    others = FILE_BYTES + HEAD_BYTES * heads + TOKEN_BYTES * tokens
    rows = (budget - others) * 3 // 4  # in base64 three bytes are four
    if rows <= 0:
        raise ConfigError(f"the page takes {others:,} bytes without any row; give a larger --budget")
    return rows


@dataclass(frozen=True)
class PageContent:
    """What a page shows.

    `has_budget` says whether rows have a budget k. `labels` are the tokens of the window of `store`, as text. `verdict`
    are sentences, and `source` says by name what was inspected; `title` names it. `reads` has the pattern of keys that
    a head follows, by layer and head, where it follows one. `causal` is what `cda_cli.causal.Effects.document` returns.
    `live` are the heads of which the page computes rows for other ε and k than the model's own, which is `eps`.
    """

    title: str
    report: Report
    store: RowStore
    labels: Sequence[str]
    verdict: Sequence[str]
    source: Mapping[str, str]
    reads: Mapping[tuple[int, int], str]
    causal: Mapping[str, Any] | None = None
    live: Sequence[LiveHead] = ()
    eps: float | None = None
    has_budget: bool = True


def write_page(path: Path, content: PageContent) -> None:
    """Writes the page whole or not at all. Raises StorageError if it cannot be written."""
    write_file(path, page(content).encode())


def page(content: PageContent) -> str:
    """The page as text."""
    shown = {(head.layer, head.head) for head in content.report.heads}
    ablations = {(each["layer"], each["head"]): each for each in (content.causal or {}).get("ablations", ())}
    ablations = {place: each for place, each in ablations.items() if place in shown}
    document = {
        **_rounded(content.report.as_dict()),
        "meanings": {n: said for n, said in MEANINGS.items() if content.has_budget or n not in OF_BUDGET},
        "labels": list(content.labels[: content.store.queries]),
        "rows": _described(content.store),
        "causal": content.causal and {**content.causal, "ablations": [*ablations.values()]},
        "live": {f"{head.layer}.{head.head}": head.queries.steps.shape[1] for head in content.live},
        "eps": content.eps,
    }
    for head in document["heads"]:
        place = (head["layer"], head["head"])
        head["reads"] = content.reads.get(place)
        if ablations:
            head[ABLATION] = ablations[place]["difference"]
    return in_template(
        title=html.escape(content.title),
        verdict="".join(f"<li>{html.escape(sentence)}</li>" for sentence in content.verdict),
        source=html.escape(" · ".join(f"{name} {said}" for name, said in content.source.items())),
        kept=html.escape(_kept(content.store)),
        report=_inert(dumps(document)),
        streams="\n".join(_streams(content)),
    )


def in_template(**parts: str) -> str:
    """The template with these parts in it, which are HTML, and with the script and the style of this version."""
    script, style = joined_script(), _text("style.css")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data: blob:"
    ours = {"policy": policy, "version": __version__, "style": style, "script": script}
    return Template(_text("template.html")).substitute(ours | parts)


def joined_script() -> str:
    """The modules of the script as one. No two of them give the same name to something, so they need no imports."""
    modules = "\n".join(_text(f"scripts/{name}.js") for name in SCRIPTS)
    return re.sub(r"^import [^;]*;\n|^export (?=\w)", "", modules, flags=re.MULTILINE)


def _text(name: str) -> str:
    return files("cda_cli.page").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """The name by which the policy of the page allows this script or style and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _inert(document: str) -> str:
    """JSON that cannot end the script element which holds it."""
    return document.replace("<", "\\u003c")


def _described(store: RowStore) -> dict[str, Any]:
    return {
        "tokens": store.tokens,
        "queries": store.queries,
        "null_keys": store.null_keys,
        "thumbnail_side": thumbnail_side(store.queries),
        "heads": [
            {
                "layer": head.layer,
                "head": head.head,
                "kept": round(head.kept, DIGITS),
                "smallest_k": head.smallest_k,
                "largest_k": head.largest_k,
            }
            for head in store.heads.values()
        ],
    }


def _streams(content: PageContent) -> list[str]:
    store = content.store
    thumbnails = b"".join(store.thumbnail(*place).tobytes() for place in store.heads)
    streams = {"thumbnails": deflate(thumbnails)}
    streams |= {f"rows-{layer}.{head}": stored.rows for (layer, head), stored in store.heads.items()}
    streams |= {f"live-{head.layer}.{head.head}": deflate(head.to_bytes()) for head in content.live}
    return [
        f'<script type="text/plain" id="{name}">{base64.b64encode(stream).decode()}</script>'
        for name, stream in streams.items()
    ]


def _kept(store: RowStore) -> str:
    heads = sorted(store.heads.values(), key=lambda head: head.kept)
    mean = sum(head.kept for head in heads) / len(heads)
    least = f"{heads[0].kept:.1%} in head {heads[0].layer}.{heads[0].head}"
    return (
        f"The maps show the first {store.queries:,} tokens of the text. Of each row they have the largest weights, "
        f"{mean:.1%} of the mass ({least}); the others count as rest."
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
