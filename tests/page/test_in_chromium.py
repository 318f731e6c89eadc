"""The page in a browser: one walk through it by keyboard (walk.js), of which each test looks at a part."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from cda_cli.inspection import NAMES, StoredRow
from cda_cli.ops import soft_topk
from cda_cli.page import PageContent
from cda_cli.page.page import page
from tests.page.content import EPS, LABELS, TOKENS, content

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, in which the page would open")


@pytest.fixture(scope="module")
def shown() -> PageContent:
    return content()


@pytest.fixture(scope="module")
def seen(shown: PageContent, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("page")
    walk = Path(__file__).with_name("walk.js").read_text(encoding="utf-8")
    # The policy of the page would not run the walk.
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page(shown), count=1)
    text = text.replace('<script type="module">', f'<script>{walk}</script>\n<script type="module">', 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    address = (folder / "page.html").as_uri() + "#head=0.2&query=5&by=keys_95"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [str(CHROMIUM), *switches, "--virtual-time-budget=20000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the walk did not end: {done.stderr[-2000:]}"
    walked: dict[str, Any] = json.loads(html.unescape(found[1]))
    return walked


def test_nothing_fails_and_nothing_is_asked_for(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["requests"] == []


def test_the_address_leads_to_a_view(seen: dict[str, Any]) -> None:
    assert seen["linked"]["address"] == {"head": "0.2", "query": "5", "by": "keys_95"}
    assert seen["linked"]["measure"] == "keys_95"
    assert seen["linked"]["own"] == "5"


def test_the_overview_has_all_heads_and_the_curve(seen: dict[str, Any], shown: PageContent) -> None:
    assert seen["overview"]["headHidden"]
    assert "head" not in seen["overview"]["address"]
    assert seen["overview"]["focused"] == "0.2", "the focus is lost when a head is closed"
    names = [f"{head.layer}.{head.head}" for head in shown.report.heads]
    assert [cell.split(",")[0] for cell in seen["cells"]] == [f"head {name}" for name in names]
    assert seen["tabStops"] == 1
    assert seen["curve"] == [
        "top, 1: 0.200 (0.180 to 0.220)",
        "top, 4: 0.050 (0.045 to 0.055)",
        "recent, 1: 0.800 (0.720 to 0.880)",
        "recent, 4: 0.200 (0.180 to 0.220)",
    ]
    keys = {name: head.measures["keys_95"] for name, head in zip(names, shown.report.heads, strict=True)}
    assert seen["sorted"] == sorted(names, key=lambda name: -keys[name])


def test_measures_that_no_head_has_are_left_out(seen: dict[str, Any], shown: PageContent) -> None:
    """As those of gradients here."""
    assert seen["measures"] == [*NAMES, "ablation_difference"]


def test_arrows_walk_through_the_heads(seen: dict[str, Any]) -> None:
    assert seen["walkedTo"] == "1.1"
    assert "keys 95" in seen["facts"]
    assert "loss without it0.250 (0.200 to 0.300)" in seen["ablated"]
    assert seen["help"]


def spoken(token: str) -> str:
    """A token as the table shows it."""
    return json.dumps(token, ensure_ascii=False)[1:-1].replace('\\"', '"').replace(" ", "␣")


def expected_table(row: StoredRow) -> list[tuple[str, str, str]]:
    """Where each kept key is, its token and its kind, as the table shows them."""
    found = []
    for key, capped in zip(row.keys.tolist(), row.capped.tolist(), strict=True):
        place = ("∅", "null key 1") if key < 0 else (str(key), spoken(LABELS[key]))
        found.append((*place, "■ capped" if capped else "● free"))
    return found


def test_the_rows_are_those_of_the_store(seen: dict[str, Any], shown: PageContent) -> None:
    """Kept keys, weights, caps and the words of the live region, of every query of a head."""
    for query, found in enumerate(seen["rows"]):
        row = shown.store.row(1, 1, query)
        assert found["own"] == query
        assert found["inView"], f"token {query} is scrolled away"
        assert sorted((at, token, kind) for at, token, _, _, _, kind in found["table"]) == sorted(expected_table(row))
        weights = sorted(float(each[3].replace("−", "-")) for each in found["table"])
        assert weights == pytest.approx(sorted(row.weights), rel=0.06, abs=6e-4)
        assert f"token {query} " in found["spoken"]
        assert f"({int(row.capped.sum())} of them capped" in found["spoken"]
    assert seen["first"] == "0"


def test_readers_of_a_token(seen: dict[str, Any], shown: PageContent) -> None:
    readers = [query for query in range(TOKENS) if 0 in shown.store.row(1, 1, query).keys]
    assert sorted(int(each[0]) for each in seen["readers"]) == readers


def test_text_is_found_across_tokens(seen: dict[str, Any]) -> None:
    assert seen["finding"] == "find"
    assert seen["found"] == {"query": str(LABELS.index("w4")), "said": "1 found"}


def test_a_live_row_is_the_operator_on_what_was_quantised(seen: dict[str, Any], shown: PageContent) -> None:
    """For twice the ε of the model, and k = 4."""
    query = LABELS.index("w4")
    live = shown.live[1]
    queries, keys = (torch.from_numpy(each.steps * each.scale[:, None]).double() for each in (live.queries, live.keys))
    weights = soft_topk(keys[: query + 2] @ queries[query], 4.0, eps=2 * EPS)
    rows = csv.DictReader(io.StringIO(seen["saved"][f"head-1.1-query-{query}.csv"]))
    found = {int(each["key"]) + 1: (float(each["weight"]), each["capped"] == "1") for each in rows}
    assert sum(weight for weight, _ in found.values()) == pytest.approx(4, rel=1e-2)
    for place, (weight, capped) in found.items():
        assert weight == pytest.approx(weights[place].item(), rel=1e-3)
        assert capped == (weights[place] >= 1 - 1e-6)
    assert {"eps": "0.04", "k": "4"}.items() <= seen["live"]["address"].items()
    assert "approximate" in seen["live"]["spoken"]
    assert not {"eps", "k"} & seen["reset"].keys()
    assert seen["liveHidden"], "sliders are shown for a head without queries and keys"


def test_what_is_saved_can_be_read(seen: dict[str, Any], shown: PageContent) -> None:
    query = LABELS.index("w4")
    row = shown.store.row(1, 1, query)
    rows = list(csv.DictReader(io.StringIO(seen["saved"]["own"])))
    found = {int(each["key"]): (float(each["weight"]), each["capped"] == "1", each["token"]) for each in rows}
    keys = zip(row.keys.tolist(), row.weights.tolist(), row.capped.tolist(), strict=True)
    assert found == {
        key: (pytest.approx(weight, rel=1e-3), capped, LABELS[key] if key >= 0 else "") for key, weight, capped in keys
    }
    curve = list(csv.DictReader(io.StringIO(seen["saved"]["loss-by-keys.csv"])))
    assert [(each["choice"], each["keys"]) for each in curve] == [
        ("top", "1"),
        ("top", "4"),
        ("recent", "1"),
        ("recent", "4"),
    ]
    picture = ET.fromstring(seen["saved"][f"head-1.1-query-{query}.svg"])
    [image] = picture.iter("{http://www.w3.org/2000/svg}image")
    assert image.attrib["href"].startswith("data:image/png;base64,")
    words = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Head 1.1", "query", "key", "λ = 1, capped", "0.01"} <= set(words)
    places = {
        float(each.attrib["x"]) for each in picture.iter("{http://www.w3.org/2000/svg}rect") if "x" in each.attrib
    }
    assert len(places) > 250, "the scale does not show every shade"
