"""Training on several datasets at once, through the real command."""

import json
import re
from pathlib import Path

import pytest

from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from data_prep.rows.mixture import names
from data_prep.rows.rows import Row
from tests.caching import write_image, write_mask
from tests.commands import run_script
from train.config import compose
from train.phases import dataset_digests, read_split, run

TIMING = ("seconds/", "samples_per_s", "memory_peak_gib")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`edits.json`: six edits of which two are held out. `keep.json`: two pictures that stay as they are. `pictures.json`: two
    text-to-image rows, one of them held out, and one with three sources."""
    folder = tmp_path_factory.mktemp("mixture")
    edits = [
        {
            "prompt": f"make it {'blue' if number % 2 else 'lean left'}",
            "image": write_image(folder / f"t{number}.png", number),
            "edit_image": write_image(folder / f"s{number}.png", 10 + number),
            "back_mask": write_mask(folder / "mask.png"),
            "split": "validation" if number > 3 else "train",
        }
        for number in range(6)
    ]
    keep = [{"prompt": "keep this as it is", "image": f"t{n}.png", "edit_image": f"t{n}.png"} for n in range(2)]
    pictures = [
        {"prompt": "a picture of blocks", "image": "t0.png"},
        {"prompt": "a picture of blocks", "image": "t1.png", "split": "validation"},
        {"prompt": "all of them", "image": "t2.png", "edit_image": ["s0.png", "s1.png", "s2.png"]},
    ]
    for name, rows in {"edits": edits, "keep": keep, "pictures": pictures}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def command(folder, tiny_model_dir, tmp_path):
    """The arguments of a short run."""

    def arguments(datasets: str, *overrides: str, exp: str = "tiny_sft") -> list[str]:
        paths = [
            f"model.path={tiny_model_dir}",
            f"cache.dir={folder}/cache",
            f"run_dir={tmp_path}/run",
            f"data.root={folder}",
        ]
        small = [
            "adapter.rank=2",
            "train.micro_batch_size=2",
            "train.num_steps=4",
            "train.save_every=2",
            "validate=none",
        ]
        given = f"data.dataset={datasets.replace('DIR', str(folder))}"
        return ["train/run.py", f"+exp={exp}", given, *paths, *small, *overrides]

    return arguments


def reader(command: list[str]) -> CacheReader:
    """The training records of a command."""
    config = compose(command[1:])
    return CacheReader(config.cache.dir, dataset_digests(config)[0])


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMING)} for line in lines]


EDITS = "{dataset:DIR/edits.json,weight:3,resolutions:{4096:1,2048:1}}"


def refusal(words: list[str], *more: str) -> str:
    """Why a run is refused, in this process: the command makes the same of it."""
    with pytest.raises(InputError) as caught:
        run(compose([*words[1:], *more]))
    return str(caught.value)


def test_a_weighted_list_trains_and_continues_exactly(command, tmp_path):
    """Edits at two areas beside regularisation rows, by the bridge; once whole, and once stopped after two steps."""
    words = command(f"[{EDITS},{{dataset:DIR/keep.json,weight:1}}]", "optim.schedule_steps=4", exp="tiny_lbm")
    done = run_script(*words)
    assert re.search(r"10 records in \d buckets, by weight:", done.stderr)
    weights = reader(words).weights
    assert weights is not None
    assert weights[:8].sum() == pytest.approx(3 * weights[8:].sum())
    other = [word.replace(f"{tmp_path}/run", f"{tmp_path}/other") for word in words]
    (tmp_path / "jobs.json").write_text(json.dumps([[*other[1:], "train.num_steps=2"], other[1:]]))
    assert "resuming from" in run_script("tests/train_many.py", tmp_path / "jobs.json").stderr
    assert metrics(tmp_path / "other") == metrics(tmp_path / "run")
    lighter = refusal([word.replace("weight:3", "weight:2") for word in words], "train.num_steps=6")
    assert "data.dataset[0].weight was 3.0 and is 2.0" in lighter
    smaller = refusal([word.replace("2048:1", "1024:1") for word in words], "train.num_steps=6")
    assert "data.dataset[0].resolutions was {4096: 1, 2048: 1} and is {4096: 1, 1024: 1}" in smaller
    assert "data.dataset had 2 datasets and has 1" in refusal(
        command(f"[{EDITS}]", exp="tiny_lbm"), "train.num_steps=6"
    )


def test_text_to_image_trains_beside_edits(command, tmp_path, capsys):
    """By flow matching, with one and three references and none; the validation leaves out what it cannot edit."""
    words = command(
        "[DIR/edits.json,DIR/pictures.json]", "validate=tiny_flow", "validate.steps=[1]", "train.num_steps=2"
    )
    done = run_script(*words)
    assert "6 records in 3 buckets:" in done.stderr
    assert "validation: 1 rows without edit_image are left out" in done.stderr
    assert {each.bucket.count("+") for each in reader(words)} == {0, 1, 3}
    assert json.loads((tmp_path / "run/validation/step-000002/metrics.json").read_text())["num_rows"] == 2
    run(compose([*words[1:], "phases=[plan]"]))
    plan = capsys.readouterr().out
    assert "data       6 rows, from the cache" in plan
    assert "64x64 (16) + text" in plan


def test_a_bridge_names_the_rows_that_it_cannot_use(command, folder, tmp_path):
    words = command("[DIR/edits.json,DIR/pictures.json]", exp="tiny_lbm")
    refused = run_script(*words, check=False)
    assert refused.returncode == 2
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert f"row 1 ({folder}/pictures.json): edit_image is missing or empty" in line
    assert "loss=flow" in line
    assert "2 of 7 rows" in line
    listed = [json.loads(line) for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
    assert [(each["row"], each["id"]) for each in listed] == [(1, "pictures/row-000001"), (2, "pictures/row-000002")]


def test_augmented_rows_are_cached_and_drawn_like_others(command, tmp_path):
    """Two further versions of each: cropped, and the first mirrored where the instruction names no side."""
    words = command(
        "DIR/edits.json", "data.augment.copies=2", "data.augment.crop=0.8", "train.num_steps=2", exp="tiny_lbm"
    )
    done = run_script(*words)
    assert "data       12 rows, from the image headers" in done.stderr
    assert "12 records in" in done.stderr
    assert "by weight" not in done.stderr, "all rows have as many versions"
    flips = [row.augmentation and row.augmentation.flip for row in reader(words).rows]
    assert flips == [None, False, False, None, True, False] * 2
    assert "data.augment.crop was 0.8 and is 0.7" in refusal(words, "data.augment.crop=0.7", "train.num_steps=3")
    rows, _ = read_split(compose(command("DIR/edits.json", "data.augment.copies=1", exp="tiny_lbm")[1:]))
    assert [row.weight for row in rows if isinstance(row, Row)] == [1, 0.5, 0.5] * 2, "some may not be mirrored"


def test_an_example_of_the_documentation_composes(folder):
    """configs/data/mixture.yaml, as docs/datasets.md has it."""
    config = compose(["+exp=tiny_sft", "data=mixture"])
    assert len(names(config.data.datasets)) == len(config.data.datasets) > 1
    assert config.data.augment.copies == 0
