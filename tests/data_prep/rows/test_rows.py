"""Dataset files of every format give the same rows; bad rows and bad files are told apart."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.errors import InputError
from data_prep.rows.rows import RejectedRow, Row, read_rows

TABLE = [
    {"prompt": "remove the sticker", "image": "out/ä 1.png", "edit_image": ["in/1.png"], "id": "first"},
    {
        "prompt": "paint it, red\n\"now\"",
        "image": "out/2.png",
        "edit_image": ["in/2.png", "in/3.png"],
        "bridge_image": 1,
        "ref_gt": "gt/2.png",
        "back_mask": "mask/2.png",
        "negative_prompt": "blurry",
        "split": "validation",
        "id": "second",
    },
]  # fmt: skip
COLUMNS = list(TABLE[1])


def write_json(path: Path, table=TABLE):
    path.write_text(json.dumps(table))


def write_jsonl(path: Path, table=TABLE):
    path.write_text("\n\n".join(json.dumps(row) for row in table))


def write_csv(path: Path, table=TABLE):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in table:
            sources = row["edit_image"]
            writer.writerow({**row, "edit_image": json.dumps(sources) if len(sources) > 1 else sources[0]})


def write_parquet(path: Path, table=TABLE):
    parquet.write_table(pa.Table.from_pylist([{**dict.fromkeys(COLUMNS), **row} for row in table]), path)


def write_folder(path: Path, table=TABLE):
    datasets.Dataset.from_list([{**dict.fromkeys(COLUMNS), **row} for row in table]).save_to_disk(path)


WRITERS = {
    "rows.json": write_json,
    "rows.jsonl": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "rows": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert list(read_rows(str(tmp_path / name), str(tmp_path))) == [
        Row(1, "first", "remove the sticker", tmp_path / "out/ä 1.png", (tmp_path / "in/1.png",)),
        Row(
            number=2,
            id="second",
            prompt='paint it, red\n"now"',
            image=tmp_path / "out/2.png",
            edit_image=(tmp_path / "in/2.png", tmp_path / "in/3.png"),
            bridge_image=1,
            ref_gt=tmp_path / "gt/2.png",
            back_mask=tmp_path / "mask/2.png",
            negative_prompt="blurry",
            split="validation",
        ),
    ]


def test_the_root_is_the_folder_of_the_dataset_file(tmp_path, monkeypatch):
    write_json(tmp_path / "rows.json")
    monkeypatch.chdir(tmp_path)
    (row, _) = read_rows("rows.json")
    assert row.image == tmp_path / "out/ä 1.png"


def test_splits_of_a_saved_dataset_name_the_split(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "p", "image": "a.png", "edit_image": "b.png"}])
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "rows")
    assert [(row.number, row.split) for row in read_rows(tmp_path / "rows")] == [(1, "train"), (2, "validation")]


BAD = {
    "prompt is missing or empty": {"prompt": " "},
    "image is missing or empty": {"image": None},
    "edit_image is missing or empty": {"edit_image": []},
    "image must be text, got 3": {"image": 3},
    "image must be text, got {'bytes'": {"image": {"bytes": "x" * 9999}},
    "is outside the root": {"back_mask": "masks/../../secret.png"},
    "must be the path of a file": {"image": "https://example.com/a.png"},
    "looks like a JSON list but is not one": {"edit_image": "[a.png, b.png]"},
    "edit_image is an empty list": {"edit_image": "[]"},
    "edit_image has 4 images, the model takes at most 3": {"edit_image": ["a", "b", "c", "d"]},
    "bridge_image=1 but edit_image has 1 image": {"bridge_image": 1},
    "bridge_image=-1": {"bridge_image": -1},
    "bridge_image must be a whole number, got 'x'": {"bridge_image": "x"},
    "bridge_image must be a whole number, got True": {"bridge_image": True},
    "the id 'taken' is already used": {"id": "taken"},
    "negative_prompt must be text": {"negative_prompt": ["a"]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_rejected_and_the_rest_survives(reason, tmp_path):
    good = {"prompt": "p", "image": "a.png", "edit_image": "b.png"}
    write_json(tmp_path / "rows.json", [{**good, "id": "taken"}, {**good, **BAD[reason]}, good])
    first, bad, last = read_rows(tmp_path / "rows.json")
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert last.id == "row-000003"
    assert isinstance(bad, RejectedRow)
    assert (bad.number, bad.path) == (2, str(tmp_path / "rows.json"))
    assert reason in bad.reason
    assert len(bad.reason) < 300


def test_unreadable_lines_are_rejected_alone(tmp_path):
    good = json.dumps({"prompt": "p", "image": "a.png", "edit_image": "b.png"})
    lines = [good, '{"prompt": ', "[1]", good.replace('"p"', '"\xe9"'), good]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert [isinstance(row, Row) for row in rows] == [True, False, False, False, True]
    (tmp_path / "rows.csv").write_bytes(b"prompt,image,edit_image\np,a,b\np,a,b,c\n\xe9,a,b\np,a\np,a,b\n")
    reasons = [row.reason if isinstance(row, RejectedRow) else None for row in read_rows(tmp_path / "rows.csv")]
    expected = [None, "more cells", "prompt is not UTF-8 text", "edit_image is missing", None]
    assert all(reason is part or part in reason for reason, part in zip(reasons, expected, strict=True))


def test_absolute_paths_and_links_are_the_users_choice(tmp_path):
    (tmp_path / "data").mkdir()
    row = {"prompt": "p", "image": str(tmp_path / "elsewhere/a.png"), "edit_image": "./sub/../b.png"}
    write_json(tmp_path / "data" / "rows.json", [row])
    (read,) = read_rows(tmp_path / "data" / "rows.json")
    assert read.image == tmp_path / "elsewhere/a.png"
    assert read.edit_image == (tmp_path / "data" / "b.png",)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_cells_may_be_separated_as_spreadsheets_do_it(sign, ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    path.write_text(
        f'\ufeffprompt{sign}image{sign}edit_image\n"one, two; three"{sign}a.png{sign}b.png\n', encoding="utf-8"
    )
    (row,) = read_rows(path)
    assert (row.prompt, row.image.name, row.edit_image[0].name) == ("one, two; three", "a.png", "b.png")


BAD_FILES = {
    "did you mean 'back_mask'": ("rows.csv", "prompt,image,edit_image,backmask\n"),
    "rename or remove it": ("rows.json", '[{"prompt": "p", "image": "a", "edit_image": "b", "zzz": 1}]'),
    "unknown column 'target' in .*rows.json, row 2: did you mean 'image'": (
        "rows.json", '[{"prompt": "p", "image": "a", "edit_image": "b"}, {"prompt": "p", "target": "a"}]',
    ),
    "unknown column 'Source' in .*did you mean 'edit_image'": ("rows.csv", "prompt;image;Source\n"),
    "unknown column 'zzz' in .*row 1": ("rows.jsonl", '{"prompt": "p", "zzz": 1}'),
    "has no column 'edit_image'": ("rows.csv", "prompt,image\np,a\n"),
    "has no column 'image'": ("rows.json", '[{"prompt": "p", "edit_image": "b"}]'),
    "has no column 'prompt'": ("empty.csv", ""),
    "the dataset .* has no rows": ("rows.csv", "prompt,image,edit_image\n"),
    "has no rows": ("rows.json", "[]"),
    "is not JSON": ("rows.json", '{"prompt": "p"}\n{"prompt": "q"}'),
    "must hold a JSON list": ("rows.json", "{}"),
    "is not a Parquet file": ("rows.parquet", "prompt"),
    "its name must end with one of .json, .jsonl, .csv, .parquet": ("rows.xlsx", "x"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_bad_dataset_is_an_input_error(message, tmp_path):
    name, text = BAD_FILES[message]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_rows(tmp_path / name))


def test_a_dataset_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no dataset at"):
        list(read_rows(tmp_path / "rows.json"))
    with pytest.raises(InputError, match=r"was not written by datasets\.save_to_disk"):
        list(read_rows(tmp_path))
    with pytest.raises(InputError, match="is not a folder"):
        list(read_rows("rows.json", tmp_path / "nowhere"))


def test_embedded_images_are_refused_with_the_way_out(tmp_path):
    features = datasets.Features(
        prompt=datasets.Value("string"), image=datasets.Image(), edit_image=datasets.List(datasets.Value("string"))
    )
    rows = [{"prompt": "p", "image": {"bytes": b"x", "path": None}, "edit_image": ["b.png"]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match=r"column 'image' .* save the images to files"):
        list(read_rows(tmp_path / "rows"))
