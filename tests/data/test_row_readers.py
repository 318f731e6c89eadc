"""Of a row only the text counts, and it is the string as it is written; what is malformed has its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cda_cli.config import DataConfig
from cda_cli.data import open_source
from cda_cli.data import row_readers as rows_module
from cda_cli.errors import DataError
from tests.data.samples import as_csv

LOOKS_LIKE_ANOTHER_TYPE = [
    "2024-05-02T10:30:00Z", "2024-01-01", "10:30", "NA", "null", "None", "nan", "true", "007", "1e3", "1,5", "0x10",
    " padded ", "3.0", "https://x", '{"a": 1}', "-", "１２",
]  # fmt: skip


def texts(path: Path, **settings: Any) -> list[str]:
    return list(open_source(DataConfig(source=str(path), **settings)).training)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("rows", [LOOKS_LIKE_ANOTHER_TYPE, ["2024-01-01"] * 3, ["1", "2"], ["true", "false"]])
def test_a_string_is_trained_as_it_is_written(folder: Path, rows: list[str]) -> None:
    write_lines(folder / "a.jsonl", [{"text": row} for row in rows])
    (folder / "a.json").write_text(json.dumps([{"text": row} for row in rows]))
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text"], *([row] for row in rows)])
    write_parquet(folder / "a.parquet", text=rows)
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert texts(folder / name) == rows, name


OTHERS: list[dict[str, Any]] = [
    {}, {"n": 1}, {"n": "n/a"}, {"n": None}, {"n": {"a": 1, "b": 2}}, {"n": {"a": "x"}}, {"n": [1, "two", None]},
    {"n": 0.5}, {"n": True}, {"n": "2024-01-01"}, {"n": 10**400}, {"new": []}, {"": 1}, {"n": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("far", [0, 15_000])
def test_other_columns_may_be_of_any_type_within_a_file_and_between_files(
    folder: Path, streaming: bool, far: int
) -> None:
    """Far into a file too: a library that infers types from the first megabytes fails there."""
    rows: list[dict[str, Any]] = [{"n": 1, "text": "x" * 800} for _ in range(far)]
    rows += [{**other, "text": f"row {index}"} for index, other in enumerate(OTHERS)]
    expected = [row["text"] for row in rows]
    write_lines(folder / "a.jsonl", rows)
    write_lines(folder / "b.jsonl", rows[::-1])
    write_lines(folder / "c.jsonl", [{"text": "only"}])
    found = texts(folder / "*.jsonl", streaming=streaming)
    assert found == [*expected, *expected[::-1], "only"]
    if not far:
        (folder / "a.json").write_text(json.dumps(rows))
        assert texts(folder / "a.json", streaming=streaming) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_tables_may_differ_between_files(folder: Path, streaming: bool) -> None:
    for name, header, rows in (
        ("a", "text,n", [["one", 1], ["two", "x"], ["three"]]),
        ("b", "url,text", [["u", "four"], ["", "five"]]),
        ("c", "text", [["six"]]),
    ):
        lines = [header, *(",".join(map(str, row)) for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    assert texts(folder / "*.csv", streaming=streaming) == ["one", "two", "three", "four", "five", "six"]
    write_parquet(folder / "a.parquet", text=["one"], n=[1])
    write_parquet(folder / "b.parquet", n=["x", None], text=["two", "three"])
    write_parquet(folder / "c.parquet", deep=[{"text": 1}], text=["four"])
    write_parquet(folder / "d.parquet", other=[])
    write_parquet(folder / "e.parquet", text=[None, None])
    assert texts(folder / "*.parquet", streaming=streaming) == ["one", "two", "three", "four"]


def test_strings_of_any_arrow_type_are_text(folder: Path) -> None:
    import pyarrow as pa

    for index, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        write_parquet(folder / f"{index}.parquet", text=pa.array(["one", None, "two"], kind))
    assert texts(folder / "*.parquet") == ["one", "two"] * 3


@pytest.mark.parametrize("empty", ["first", "last"])
@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".json", ".csv"])
def test_a_shard_without_rows_is_passed_over(folder: Path, ending: str, empty: str) -> None:
    names = ("a", "b") if empty == "first" else ("b", "a")
    for name, rows in zip(names, ([], ["one", "two"]), strict=True):
        path = folder / f"{name}{ending}"
        if ending == ".parquet":
            import pyarrow as pa

            write_parquet(path, text=pa.array(rows, pa.string()))
        elif ending == ".csv":
            path.write_text("\n".join(["text", *rows]) + "\n")
        elif ending == ".json":
            path.write_text(json.dumps([{"text": row} for row in rows]))
        else:
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows) or "\n")
    assert texts(folder / f"*{ending}") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', r"^line 3 of .*a\.jsonl is not JSON \(.*\); mend it, or"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}\n', r"^line 1 of .* is not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"^line 2 of .*a\.jsonl is a list, not an object; mend it, or give"),
        ("a.jsonl", '{"text": "a"}\n{"text": 7}\n', r"^the column 'text' of .* holds a number in line 2, not text; "),
        ("a.jsonl", '{"text": {"b": 1}}\n', r"holds an object in line 1, not text; choose another --text-column$"),
        ("a.jsonl", '{"text": "a\\ud83d"}\n', r"^line 1 of .*a\.jsonl holds half of a surrogate pair, which is no "),
        ("a.jsonl", "[" * 100_000 + "\n", r"^line 1 of .*a\.jsonl is not JSON"),
        ("a.jsonl", '{"body": "a"}\n{"b": 1}\n', r"a\.jsonl has no column 'text'; choose --text-column from body, b$"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', r"^line 2 of .*a\.json is not JSON \(.*\); mend it, or give"),
        ("a.json", '[{"text": "a"},\n{"text": "b"}', r"^line 2 of .*a\.json is not JSON"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"^line 2 of .*a\.json is not JSON \(Expecting ',' or '\]'\)"),
        ("a.json", '[{"text": "a"}]\n]', r"^line 2 of .*a\.json is not JSON"),
        ("a.json", '[{"text": "a"}, ]', r"^line 1 of .*a\.json is not JSON"),
        ("a.json", '[{"text": "a"}, 3]', r"^row 2 of .*a\.json is a number, not an object"),
        (
            "a.csv",
            'text,n\none,1\n"two,2\n',
            r"^line 3 of .*a\.csv is not CSV \(.*\); mend it, or give --data",
        ),
        ("a.csv", "text,n\none,1\ntwo, and more,2\n", r"^line 3 of .*a\.csv has 3 fields, and its first line names 2 "),
        ("a.csv", 'text\n"one"x\n', r"^line 2 of .*a\.csv is not CSV"),
        ("a.csv", "body\none\n", r"a\.csv has no column 'text'; choose --text-column from body$"),
    ],
)
def test_what_is_malformed_has_its_file_and_line(folder: Path, name: str, content: str, sentence: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=sentence) as caught:
        texts(folder / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_with_another_packing_or_bytes_is_one_sentence(folder: Path) -> None:
    import gzip

    path = write_parquet(folder / "a.parquet", text=[b"\xff\xfe", b"a"])
    with pytest.raises(DataError, match=r"^the column 'text' of .* holds binary, not text; choose another"):
        texts(path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"is compressed with gzip, which a \.parquet is not read with; unpack it$"):
        texts(path)


def test_a_whole_file_of_rows_without_the_column_is_not_left_out_unsaid(folder: Path) -> None:
    write_lines(folder / "a.jsonl", [{"text": "one"}, {"n": 1}])
    write_lines(folder / "b.jsonl", [{"body": "two"}])
    with pytest.raises(DataError, match=r"b\.jsonl has no column 'text'; choose --text-column from body$"):
        texts(folder / "*.jsonl")


def test_a_json_file_may_spread_its_rows_over_lines(folder: Path) -> None:
    rows = [{"n": index, "text": f"row {index}"} for index in range(5)]
    expected = [row["text"] for row in rows]
    for name, content in (
        ("array", json.dumps(rows, indent=2)),
        ("values", "\n".join(json.dumps(row, indent=2) for row in rows)),
        ("lines", "\n".join(map(json.dumps, rows))),
        ("strings", json.dumps(expected)),
    ):
        (folder / f"{name}.json").write_text(content)
        assert texts(folder / f"{name}.json") == expected, name


ROWS = st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=30), max_size=12)


@given(ROWS, st.integers(1, 40), st.sampled_from([None, 1]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_come_back_from_any_place(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], part: int, indent: int | None
) -> None:
    """JSON is read in parts as small as a character; rows of any characters, from each position on."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.json").write_bytes(json.dumps([{"text": r} for r in rows], indent=indent, ensure_ascii=False).encode())
    (folder / "a.jsonl").write_bytes(b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows))
    (folder / "a.csv").write_bytes(as_csv([["text", "n"], *([row, 1] for row in rows)]))
    kept = [row for row in rows if row]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "JSON_CHARACTERS", part)
        for name in ("a.json", "a.csv", "a.jsonl") if rows else ("a.json", "a.csv"):
            source = open_source(DataConfig(source=str(folder / name)))
            found = list(source.training.read())
            assert [text for text, _ in found] == kept, name
            for index, (_, position) in enumerate(found):
                assert [text for text, _ in source.training.read(position)] == kept[index + 1 :], name


def link(folder: Path, name: str) -> Path:
    blob = write_lines(folder / "3f2a9c", [{"text": "linked"}])
    (folder / name).symlink_to(blob)
    return folder / name


@pytest.mark.parametrize(
    "name",
    ["train.jsonl", "wiki::en.jsonl", "a?b.jsonl", "a[1].jsonl", "[x].jsonl", "50%20 of#it.jsonl", "hf:a.jsonl",
     "a b.jsonl", "file:a.jsonl", "zip:::a.jsonl", "a*.jsonl", "é🙂.jsonl", "~a.jsonl", "a'\"b.jsonl", "memory:a.jsonl",
     "-a.jsonl"],
)  # fmt: skip
@pytest.mark.parametrize("make", [link, lambda folder, name: write_lines(folder / name, [{"text": "linked"}])])
def test_the_name_that_is_given_says_the_kind_and_nothing_else(
    folder: Path, name: str, make: Callable[[Path, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link is what its own name says; no character has a meaning, but those of a glob that matches."""
    path = make(folder, name)
    assert texts(path) == ["linked"]
    assert texts(folder / "*.jsonl") == ["linked"]
    monkeypatch.chdir(folder)
    assert texts(Path(name) if not name.startswith(("hf:", "~")) else Path("*.jsonl")) == ["linked"]
