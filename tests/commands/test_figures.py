"""`cda inspect-sparsity --figures`: what is written, that it is what was measured, and that it can be drawn again."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from cda_cli.causal import Examination, Wanted
from cda_cli.commands.figure_options import STYLES as OFFERED
from cda_cli.errors import ConfigError, DataError
from cda_cli.figures import FIGURES, gather, redraw, write_figures
from cda_cli.figures.csv_rows import from_csv, to_csv
from cda_cli.figures.maps import Weight
from cda_cli.inspection import ReportWatcher
from cda_cli.plots import STYLES, save, styled
from cda_cli.restore import open_side, restore_on
from cda_cli.signals import StopRequest
from tests.commands.helpers import Cda, assert_refused, run_cda

LARGEST = 2**20  # bytes of a picture of lines


@pytest.fixture(scope="module")
def figures(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all figures, and the document that was printed with them."""
    base = tmp_path_factory.mktemp("figures")
    folder = base / "a folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(base / "cache"))
        asked = ("--causal", "--ablate", "heads", "--max-batches", 4, "--heads", "1,0", "--figures", folder, "--json")
        result = run_cda("inspect-sparsity", finished, *asked)
    assert result.code == 0, result.err
    assert result.err == f"wrote 8 figures into {folder}\n"
    return folder, json.loads(result.out)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_comes_with_its_numbers_and_its_command(figures: tuple[Path, Any], finished: Path) -> None:
    folder, _ = figures
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {f"paper/{name}.{ending}" for name in FIGURES for ending in ("pdf", "svg", "png")}
    assert found == {f"{name}.{ending}" for name in FIGURES for ending in ("csv", "txt")} | pictures
    for name in FIGURES:
        caption, _, command = (folder / f"{name}.txt").read_text(encoding="utf-8").partition("\n\n")
        assert str(finished) in caption
        assert command.startswith("cda inspect-sparsity --device cpu ")
        assert command.endswith(f"--figures '{folder}' --json\n"), "the command does not say where to"


def test_the_numbers_are_those_of_the_report(figures: tuple[Path, Any]) -> None:
    folder, found = figures
    heads = {(head["layer"], head["head"]): head for head in found["heads"]}
    for row in rows(folder, "heads"):
        assert float(row["value"]) == heads[int(row["layer"]), int(row["head"])][row["measure"]]
    cuts = {(cut["choice"], cut["keys"]): cut for cut in found["causal"]["cuts"]}
    kept = rows(folder, "loss-against-keys")
    assert len(kept) == len(cuts)
    for row in kept:
        cut = cuts[row["choice"], int(row["keys"])]
        assert [float(row[name]) for name in ("difference", "low", "high")] == [
            cut["difference"],
            *cut["difference_interval"],
        ]
    ablated = [row for row in rows(folder, "ablation") if row["measure"] == "gradient"]
    expected = [(each["gradient"], each["difference"]) for each in found["causal"]["ablations"]]
    assert [(float(row["value"]), float(row["difference"])) for row in ablated] == expected
    assert {row["step"] for row in rows(folder, "training")} == {"1", "2", "3", "4", "5", "6"}
    weights = rows(folder, "head-map")
    of_row = [float(row["weight"]) for row in weights if row["query"] == "20"]
    assert len(of_row) == 22, "the query sees itself, 20 keys before it and a null key"
    smallest, largest = (heads[0, 1]["quantiles"]["sparsity_k"][end] for end in ("p5", "p95"))
    assert 0.9 * smallest < sum(of_row) < 1.1 * largest, "the row does not sum to its k"
    assert [row["key_token"] for row in weights if row["query"] == "0"] == ["∅", weights[0]["query_token"]]
    for name in ("distances", "units"):
        assert {row["layer"] for row in rows(folder, name)} == {"0", "1"}
    mass = [float(row["share"]) for row in rows(folder, "distances") if row["layer"] == "0"]
    assert sum(mass) == pytest.approx(1)


@pytest.mark.parametrize("name", FIGURES)
def test_the_numbers_draw_the_same_picture_again(figures: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    """To the byte. Text stays text, and a file stays small."""
    folder, _ = figures
    drawn = (folder / "paper" / f"{name}.svg").read_bytes()
    description = " ".join((folder / f"{name}.txt").read_text(encoding="utf-8").split("\n")).replace("  ", " ").strip()
    with styled(STYLES["paper"]):
        save(redraw(folder / f"{name}.csv"), tmp_path / "again.svg", name, description)
    assert (tmp_path / "again.svg").read_bytes() == drawn
    assert b"<text" in drawn
    assert len(drawn) < LARGEST
    pdf = (folder / "paper" / f"{name}.pdf").read_bytes()
    assert b"/FontFile2" in pdf, "the font is not embedded"
    assert b"/Type3" not in pdf, "letters are drawings, which many publishers refuse"


@pytest.mark.parametrize("style", STYLES)
def test_styles_differ_in_colours_and_in_size(figures: tuple[Path, Any], style: str) -> None:
    figure = redraw(figures[0] / "distances.csv", style)
    widths = {"paper": 6.75, "slides": 12.8, "dark": 10, "mono": 6.75}
    assert figure.get_size_inches()[0] == pytest.approx(3.25 / 6.75 * widths[style])
    assert figure.get_facecolor()[0] == pytest.approx(22 / 255 if style == "dark" else 1)
    lines = figure.axes[0].get_lines()
    assert len({line.get_linestyle() for line in lines}) == (2 if style == "mono" else 1)
    assert tuple(STYLES) == OFFERED, "the command offers other styles"


def test_any_token_can_be_a_label(tmp_path: Path) -> None:
    """A dollar is no formula, and a character that the font lacks is marked; neither is told on stderr."""
    tokens = ["$x_1$", "漢", "\n", "\r", " the"]
    found = [Weight(t, token, s, tokens[s], 1.0, 1) for t, token in enumerate(tokens) for s in range(t + 1)]
    (tmp_path / "head-map.csv").write_bytes(to_csv(found).encode())
    with warnings.catch_warnings(), styled(STYLES["paper"]):
        warnings.simplefilter("error")
        save(redraw(tmp_path / "head-map.csv"), tmp_path / "head-map.svg")
    drawn = (tmp_path / "head-map.svg").read_text(encoding="utf-8")
    for label in ("$x_1$", "\N{REPLACEMENT CHARACTER}", "⏎", "␣the", "capped: λ = 1"):
        assert label in drawn


def test_what_was_not_measured_is_left_out_and_said(finished: Path, tmp_path: Path) -> None:
    """No causal checks were made, and a copy of a checkpoint has no run around it."""
    copied = shutil.copytree(next(finished.glob("checkpoints/*6")), tmp_path / "copy")
    restored, dtype = restore_on(copied, "cpu", "float32", "auto")
    with StopRequest() as stop:
        text = open_side(restored, None, None, stop, False)
    watcher = ReportWatcher(keep=(0, 0))
    examined = Examination(False, Wanted([], [])).run(restored, dtype, watcher, lambda: text.batches(1, 1)[0])
    assert watcher.kept is not None
    material = gather(examined, restored, text, (0, 0), watcher.kept)
    written = write_figures(tmp_path / "figures", material, [], "a command")
    left_out = ("loss-against-keys", "ablation", "training")
    assert written.words.startswith(
        f"wrote 5 figures into {tmp_path / 'figures'}; {left_out[0]} is left out (--causal "
    )
    assert tuple(written.missing) == left_out
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(FIGURES) - set(left_out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--figures", "here", "--figure-style", "papper"], "did you mean 'paper'?"),
        (["--figures", "a-file"], "a-file is a file"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_checkpoint_is_read(
    cda: Cda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    assert_refused(cda("inspect-sparsity", "no-run", *options), words)


def test_a_file_that_is_no_figure_is_refused(tmp_path: Path) -> None:
    for name, content, error in (
        ("heads.csv", "a,b\n1,2\n", DataError),
        ("heads.csv", "measure,layer,head,value\nk,x,0,1\n", DataError),
        ("heads.csv", "measure,layer,head,value\n", DataError),
        ("other.csv", "", ConfigError),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(error):
            redraw(tmp_path / name)
    (tmp_path / "units.csv").write_bytes(b"\xff")
    for name, words in (("units.csv", "is not UTF-8"), ("distances.csv", "cannot be read")):
        with pytest.raises(DataError, match=words):
            redraw(tmp_path / name)


@pytest.mark.parametrize("token", ["\r", "\n", "\r\n", '"', ",", "", "漢"])
def test_any_token_reads_back_from_the_numbers(token: str) -> None:
    found = [Weight(0, token, 0, token, 0.5, 0)]
    assert from_csv(to_csv(found).encode().decode(), Weight) == found
