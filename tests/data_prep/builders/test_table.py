"""Tables of any columns and formats give the same dataset; what is wrong with a row or a file is told apart."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.builders.table import command
from data_prep.rows.rows import Row, read_rows
from data_prep.rows.tables import COLUMNS as OF_A_DATASET
from tests.pictures import dataset, prepare, rejected, save

ROWS = [
    {"name": "one", "after": "t/ä 1.png", "before": "s/1.png", "logo": None, "what": "hat", "mask": "m/1.png"},
    {
        "name": "two",
        "after": "t/2.png",
        "before": "s/1.png",
        "logo": "s/2.png",
        "what": 'red, "old"\ncar',
        "mask": None,
    },
]
COLUMNS = ("--column", "image=after", "--column", "edit_image=before", "--column", "edit_image=logo",
           "--column", "back_mask=mask", "--column", "id=name", "--column", "tag=what")  # fmt: skip


def write_delimited(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Any] = {
    "rows.csv": lambda path: write_delimited(path, ","),
    "rows.tsv": lambda path: write_delimited(path, "\t"),
    "rows.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8"),
    "rows.jsonl": lambda path: path.write_text(
        "\n".join(json.dumps({k: v for k, v in row.items() if v}) for row in ROWS)
    ),
    "rows.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("t/ä 1", "t/2", "s/1", "s/2", "m/1"):
        save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_dataset(name, photos, tmp_path):
    WRITERS[name](tmp_path / name)
    options = ("--root", os.path.relpath(photos), *COLUMNS, "--prompt", "Remove the {what}")
    prepare("table", "--table", tmp_path / name, "--out", tmp_path / "out", *options)
    assert dataset(tmp_path / "out") == [
        {"id": "one", "prompt": "Remove the hat", "image": str(photos / "t/ä 1.png"), "edit_image": str(photos / "s/1.png"),
         "back_mask": str(photos / "m/1.png"), "tag": "hat"},
        {"id": "two", "prompt": 'Remove the red, "old"\ncar', "image": str(photos / "t/2.png"),
         "edit_image": [str(photos / "s/1.png"), str(photos / "s/2.png")], "tag": 'red, "old"\ncar'},
    ]  # fmt: skip
    assert all(isinstance(row, Row) for row in read_rows(tmp_path / "out/dataset.jsonl"))


def test_columns_of_a_dataset_need_no_map_and_paths_below_out_become_relative(photos, tmp_path):
    (photos / "rows.csv").write_text(
        "prompt,image,edit_image,bridge_image,split,group,weight,colour\n"
        'p,t/2.png,"[""s/1.png"", ""s/2.png""]",1,validation,g,2.5,red\n'
    )
    done = prepare("table", "--table", photos / "rows.csv", "--out", photos)
    assert dataset(photos) == [
        {"id": "row-000001", "prompt": "p", "image": "t/2.png", "edit_image": ["s/1.png", "s/2.png"], "bridge_image": 1,
         "split": "validation", "group": "g", "weight": 2.5},
    ]  # fmt: skip
    assert "columns that are not used: colour" in done.stdout
    (row,) = read_rows(photos / "dataset.jsonl")
    assert isinstance(row, Row)
    assert (row.image, row.weight) == (photos / "t/2.png", 2.5)


def test_the_help_names_every_column():
    assert [name for name in OF_A_DATASET if name not in str(command.__doc__)] == []


@pytest.fixture(scope="module")
def many_faults(photos, tmp_path_factory):
    """A CSV file, not all of it UTF-8, with a fault in every second row."""
    good = b"%s,t/2.png,s/1.png,hat\n"
    faults = {
        "more cells than the header": b"x,t/2.png,s/1.png,hat,more\n",
        "needs {what}": b"short,t/2.png,s/1.png\n",
        "image is missing or empty (image is the column after)": b"x,,s/1.png,hat\n",
        "prompt is not UTF-8": b"x,t/2.png,s/1.png,h\xe9t\n",
        "image holds a zero byte": b"x,t/2\0.png,s/1.png,hat\n",
        "is already used": b"good-0,t/2.png,s/1.png,hat\n",
        "is outside the root": b"x,../../etc/x.png,s/1.png,hat\n",
        "must be the path of a file": b"x,https://example.org/a.png,s/1.png,hat\n",
        "no such file": b"gone,t/gone.png,s/1.png,hat\n",
        "cannot be read: Is a directory": b"folder,t,s/1.png,hat\n",
    }
    lines = [line for number, fault in enumerate(faults.values()) for line in (good % b"good-%d" % number, fault)]
    folder = tmp_path_factory.mktemp("faults")
    (folder / "rows.csv").write_bytes(b"id,after,before,what\n" + b"".join(lines))
    columns = ("--column", "image=after", "--column", "edit_image=before", "--prompt", "Remove the {what}")
    done = prepare(
        "table", "--table", folder / "rows.csv", "--root", photos, "--out", folder / "out", *columns, check=False
    )
    return folder / "out", done, list(faults)


def test_every_fault_has_its_row_and_reason_and_the_rest_survives(many_faults):
    out, done, faults = many_faults
    found = json.loads("[" + ",".join((out / "rejected.jsonl").read_text().splitlines()) + "]")
    assert [each["row"] for each in found] == [2 * number for number in range(1, len(faults) + 1)]
    for each, reason in zip(found, faults, strict=True):
        assert reason in each["reason"]
    assert [row["id"] for row in dataset(out)] == [f"good-{number}" for number in range(len(faults))]
    assert done.returncode == 2
    assert "row 2 (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_a_file_is_reported_with_the_file(many_faults):
    out, _, _ = many_faults
    assert rejected(out)["gone"] == (18, "gone.png", "no such file")
    assert rejected(out)["row-000002"][1] == "rows.csv"


def test_broken_lines_of_jsonl_are_rejected_alone(photos, tmp_path):
    good = {"prompt": "p", "image": "t/2.png", "edit_image": "s/1.png"}
    texts = [json.dumps(good), '{"prompt": ', "[]", json.dumps({**good, "image": 3}), "", json.dumps({"prompt": "p"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(texts))
    options = ("--root", photos, "--out", tmp_path, "--on-error", "skip")
    done = prepare("table", "--table", tmp_path / "rows.jsonl", *options)
    assert "4 could not be used" in done.stdout
    reasons = [reason for _, _, reason in rejected(tmp_path).values()]
    assert [row["id"] for row in dataset(tmp_path)] == ["row-000001"]
    for part, reason in zip(["not JSON", "not an object", "must be text, got 3", "is missing"], reasons, strict=True):
        assert part in reason


HEADER = "after,before,what\nt/2.png,s/1.png,hat\n"
MAP = ("--column", "image=after", "--column", "edit_image=before")
WRONG: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "is UTF-16 text: save it as UTF-8": ("rows.csv", HEADER.encode("utf-16"), MAP),
    "rows.tsv is UTF-16 text": ("rows.tsv", HEADER.encode("utf-16-le"), MAP),
    "has no column 'afer'; it has after, before, what": (
        "rows.csv", HEADER.encode(), ("--column", "image=afer", "--column", "edit_image=before"),
    ),
    "has no column 'prompt': add --prompt, --templates or --column prompt=": ("rows.csv", HEADER.encode(), MAP),
    "has no column 'edit_image': add --column edit_image=": ("rows.csv", HEADER.encode(), (*MAP[:2], "--prompt", "p")),
    "unknown field {why}": ("rows.csv", HEADER.encode(), (*MAP, "--prompt", "{why}")),
    "did you mean 'edit_image'?": ("rows.csv", HEADER.encode(), ("--column", "edit_images=before")),
    "must be NAME=COLUMN": ("rows.csv", HEADER.encode(), ("--column", "image")),
    "--column image=… is given 2 times": ("rows.csv", HEADER.encode(), ("--column", "image=a", "--column", "image=b")),
    "both give the instruction": ("rows.csv", HEADER.encode(), (*MAP, "--column", "prompt=what", "--prompt", "p")),
    "several columns called 'after'": ("rows.csv", b"after,before,after\na,b,c\n", MAP),
    "has no rows": ("rows.csv", b"after,before,prompt\n", MAP),
    "has no column 'after'": ("rows.csv", b"", MAP),
    "is not a Parquet file": ("rows.parquet", b"PAR1 and no more", MAP),
    "must hold a JSON list": ("rows.json", b"{}", MAP),
    "its name must end with one of": ("rows.xlsx", b"", MAP),
    "there is no dataset at": ("", b"", ("--table", "nowhere.csv")),
    "is not a folder": ("rows.csv", HEADER.encode(), (*MAP, "--prompt", "p", "--root", "nowhere")),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_table_or_command_is_answered_in_a_sentence(message, tmp_path):
    name, data, options = WRONG[message]
    if name:
        (tmp_path / name).write_bytes(data)
        options = ("--table", str(tmp_path / name), *options)
    done = prepare("table", "--out", tmp_path / "out", *options, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
