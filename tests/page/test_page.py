"""The page is one file that holds the whole report, needs nothing else, and stays within its budget."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cda_cli.errors import ConfigError
from cda_cli.inspection import GRADIENTS, NAMES, RowStore, StoredHead
from cda_cli.inspection.row_codes import RowArrays, deflate, encode, inflate
from cda_cli.page import PageContent, bytes_for_rows, write_page
from cda_cli.page.meanings import ABLATION, MEANINGS
from cda_cli.page.page import page
from tests.page.content import HEADS, LABELS, LAYERS, TOKENS, content, cuts

PARTS = {"script", "style", "title"}


class Parsed(HTMLParser):
    """The attributes of all elements, the content of those in PARTS by their ids, and the text of the others."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, str] = {}
        self.texts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = (dict(attrs).get("id") or tag) if tag in PARTS else ""

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.contents[self._open] = self.contents.get(self._open, "") + data
        else:
            self.texts.append(data)


@pytest.fixture(scope="module")
def shown() -> PageContent:
    return content()


@pytest.fixture(scope="module")
def parsed(shown: PageContent) -> Parsed:
    return Parsed(page(shown))


def test_the_figures_are_those_of_the_report(shown: PageContent, parsed: Parsed) -> None:
    found = json.loads(parsed.contents["report"])
    assert found["labels"] == LABELS
    assert found["causal"] == shown.causal
    for head, expected in zip(found["heads"], shown.report.heads, strict=True):
        assert (head["layer"], head["head"]) == (expected.layer, expected.head)
        figures = {name: np.nan if head[name] is None else head[name] for name in NAMES}
        assert figures == pytest.approx(dict(expected.measures), rel=1e-4, nan_ok=True)
        assert head["reads"] == shown.reads.get((expected.layer, expected.head))


def test_the_rows_are_those_of_the_store(shown: PageContent, parsed: Parsed) -> None:
    for (layer, head), stored in shown.store.heads.items():
        assert base64.b64decode(parsed.contents[f"rows-{layer}.{head}"]) == stored.rows
    thumbnails = inflate(base64.b64decode(parsed.contents["thumbnails"]), LAYERS * HEADS * TOKENS**2)
    expected = np.stack([shown.store.thumbnail(*place) for place in shown.store.heads])
    assert np.array_equal(np.frombuffer(thumbnails, np.uint8).reshape(expected.shape), expected)


def test_text_stays_text(parsed: Parsed) -> None:
    """Tokens, titles and sentences may look like markup."""
    text = "".join(parsed.texts)
    assert "Rows & sums < 2." in text
    assert "What <the model> selects" in text
    assert parsed.contents["title"] == "What <the model> selects"


def test_nothing_is_asked_for_from_elsewhere(parsed: Parsed) -> None:
    """The policy forbids it, and allows to run what the page brings and no more."""
    [policy] = [each["content"] or "" for tag, each in parsed.elements if each.get("http-equiv")]
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data: blob:"
    for directive, name in (("script-src", "script"), ("style-src", "style")):
        digest = hashlib.sha256(parsed.contents[name].encode()).digest()
        assert allowed[directive] == f"'sha256-{base64.b64encode(digest).decode()}'"
    for tag, attributes in parsed.elements:
        assert not {"src", "style"} & attributes.keys(), f"the policy blocks an attribute of <{tag}>"
        assert not [name for name in attributes if name.startswith("on")], f"<{tag}> has a handler that is blocked"
        assert (attributes.get("href") or "data:,") == "data:,"


def test_every_measure_has_its_meaning() -> None:
    assert tuple(MEANINGS) == (*NAMES, *GRADIENTS, ABLATION)


def test_ids_are_given_once_and_those_that_the_script_asks_for_are_there(parsed: Parsed) -> None:
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r'byId\("([\w-]+)"\)', parsed.contents["script"]))
    assert asked
    assert asked <= set(ids)


def full_store(heads: int, tokens: int, keys: int, budget: int) -> RowStore:
    """Rows that hardly deflate, each of `keys` keys, or of fewer where these do not fit into the budget."""
    random = np.random.default_rng(0)
    while True:
        length = np.minimum(np.arange(tokens) + 1, keys)
        distance = np.concatenate([np.sort(random.choice(t + 1, n, replace=False)) for t, n in enumerate(length)])
        weight = 2.0 ** random.uniform(-9, 0, len(distance))
        k, rest = random.uniform(1, 4, tokens), random.uniform(0, 1, tokens)
        rows = RowArrays(length, k, rest, np.zeros(tokens), distance, weight, np.zeros(len(distance), bool))
        streams = encode(rows, 1.0, 4.0), deflate(random.integers(0, 256, 64 * 64, np.uint8).tobytes())
        stored = [StoredHead(0, head, keys, 0.5, 1.0, 4.0, *streams) for head in range(heads)]
        store = RowStore(tokens, tokens, 0, 0.99, stored)
        if len(store.to_bytes()) <= budget:
            return store
        keys -= 1


@pytest.mark.parametrize("budget", [1_500_000, 3_000_000])
def test_the_page_stays_within_its_budget(shown: PageContent, budget: int, tmp_path: Path) -> None:
    """Whatever the rows: these fill what they are given, and neither they nor their thumbnails deflate."""
    heads, tokens = 36, 512
    store = full_store(heads, tokens, 64, bytes_for_rows(budget, heads, tokens))
    [figures, *_] = shown.report.heads
    ranges = figures.distance_mass * 2
    by_position = dict.fromkeys(figures.by_position, [0.12345] * len(ranges))
    same = [
        replace(figures, layer=0, head=head, by_position=by_position, distance_mass=ranges) for head in range(heads)
    ]
    report = replace(shown.report, heads=same)
    [ablation, *_] = cuts()["ablations"]
    causal = {**cuts(), "ablations": [{**ablation, "layer": 0, "head": head} for head in range(heads)]}
    path, labels = tmp_path / "page.html", [" word"] * tokens
    write_page(path, replace(shown, report=report, store=store, labels=labels, causal=causal, live=()))
    assert 0.75 * budget < path.stat().st_size <= budget


def test_a_budget_without_room_for_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="give a larger --budget"):
        bytes_for_rows(1_000_000, 144, 1024)
