"""Tables of edits: columns, failures, what is done again and what is not, and the processes that share the work."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from data_prep.builders.overlay.overlay_table import Photographs
from data_prep.builders.overlay.typography import DEFAULT_FONT
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.images import file_digest
from data_prep.rows.rows import RejectedRow
from eval.bases.auto import open_model
from eval.edit import edit
from eval.qwen.editor import Editor
from eval.request.base import BaseEditor
from eval.request.knobs import MODES, AdapterUse
from eval.request.options import ModelOptions, PlaceOptions
from eval.request.provenance import read_png
from eval.request.request import Abilities, EditRequest, EditResult, OnProgress
from eval.request.sizes import SizeLimits
from eval.tables.command import TableOptions, edit_table
from eval.tables.job_files import JobFiles
from eval.tables.runner import READERS, WAITING, run_jobs
from eval.tables.table import Job, read_jobs
from tests.adapters import write_adapter
from tests.caching import write_image, write_mask
from tests.children import started, wait_until
from tests.commands import launch, run_script, warm_python

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)


@dataclass
class Copies(BaseEditor):
    """Returns the images that it is given, and fails where the prompt says so."""

    done: list[str] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    abilities = Abilities("copies", MODES, 3)
    folder = Path("copies")
    fingerprint = "copies"

    def geometry_for(self, adapters) -> Geometry:
        return SMALL

    def compared_steps(self, request: EditRequest) -> tuple[int, ...]:
        return (1,)

    def batch_key(self, request: EditRequest) -> Any:
        return request.images[0].size

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> list[EditResult]:
        if request.prompt == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        if request.prompt == "memory of the machine":
            torch.empty(2**60, dtype=torch.uint8)
        if request.prompt == "bug":
            raise ZeroDivisionError("a mistake of the program")
        self.done.append(request.prompt)
        return [EditResult(request.images[0], seed, 0.5, {"prompt": request.prompt}) for seed in request.seeds]

    def edit_together(self, requests, on_progress=None):
        self.together.append(len(requests))
        return super().edit_together(requests, on_progress)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, tiny_model_dir):
    """Photographs of two shapes, a mask, and a bridge."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        write_image(folder / f"photo{number}.png", number)
    write_image(folder / "wide.png", 9, 96, 64)
    write_mask(folder / "mask.png")
    write_adapter(folder / "bridge", tiny_model_dir, "lbm", SMALL, bridge_noise=0.005)
    return folder


def nothing(_: EditRequest) -> dict[str, Any]:
    """For keys of rows alone."""
    return {}


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def jobs_of(table: Path, root: Path, names: dict[str, str] | None = None, **options: Any) -> list[Any]:
    return read_jobs(table, root, Photographs(root, names or {}), options)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def command(*arguments: object) -> None:
    """The command, in this process."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(edit)
    app([str(argument) for argument in arguments], standalone_mode=False)


MIXED = [
    {"id": "one", "image": "photo0.png", "prompt": "brighten", "seed": "4"},
    {"id": "gone", "image": "missing.png", "prompt": "x"},
    {
        "id": "two",
        "image": "wide.png",
        "prompt": "a longer instruction, 编辑",
        "count": "2",
        "sampler": "bridge-stochastic",
    },
    {"id": "odd", "image": "photo1.png", "prompt": "x", "size": "65x64"},
    {"id": "text", "image": "photo1.png", "prompt": "x", "seed": "four"},
    {"id": "one", "image": "photo1.png", "prompt": "x"},
    {"id": "mask", "image": "wide.png", "prompt": "x", "mode": "inpaint", "mask": "mask.png"},
    {"id": "three", "image": "photo2.png", "prompt": "darken"},
    {"id": "four", "image": "photo3.png", "prompt": "remove the sticker from the photograph"},
    {"id": "out", "image": "../secret.png", "prompt": "x"},
    {"id": "five", "image": "photo1.png", "prompt": "x", "mode": "inpaint", "mask": "mask.png", "steps": "1"},
]


def test_good_rows_are_done_and_bad_ones_listed(photos, tiny_model_dir, tmp_path):
    """Through the real command; then rows in batches are compared with rows alone."""
    table = write_table(tmp_path / "jobs.csv", MIXED)
    base = ["--model", tiny_model_dir, "--adapter", photos / "bridge", "--csv", table, "--root", photos, "--steps", "2"]
    done = run_script("eval/edit.py", *base, "--batch-size", "3", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: 6 of 11 rows failed, {tmp_path}/out/failed.csv says why" in done.stderr
    assert "Traceback" not in done.stderr
    results = read(tmp_path / "out/results.csv")
    assert [(row["row"], row["id"], row["seed"]) for row in results] == [
        ("1", "one", "4"),
        ("3", "two", "0"),
        ("3", "two", "1"),
        ("8", "three", "0"),
        ("9", "four", "0"),
        ("11", "five", "0"),
    ]
    assert all(float(row["seconds"]) > 0 for row in results)
    failed = read(tmp_path / "out/failed.csv")
    assert [row["id"] for row in failed] == ["gone", "odd", "text", "one", "mask", "out"]
    assert {row["row"]: row["reason"] for row in failed} == {
        "2": "no such file",
        "4": "size must be in multiples of 32, got 65x64",
        "5": "seed must be a number, got 'four'",
        "6": "the id 'one' is already used by an earlier row",
        "7": "the mask and its image have different shapes: 64x64, its image is 96x64",
        "10": f"image '../secret.png' is outside the root folder {photos}",
    }
    settings = read_png(tmp_path / "out" / results[0]["output"])
    assert (settings["seed"], settings["steps"], settings["prompt"]) == (4, 2, "brighten")
    assert settings["adapters"][0]["weight"] == 1.0
    five = read_png(tmp_path / "out" / results[-1]["output"])
    assert (five["mode"], five["steps"]) == ("inpaint", 1)
    assert [each["name"] for each in five["images"]] == ["photo1.png", "mask.png"]

    with pytest.raises(InputError, match="6 of 11 rows failed"):
        command(*base, "--out", tmp_path / "alone")
    alone = read(tmp_path / "alone/results.csv")
    assert [row["output"] for row in alone] == [row["output"] for row in results]
    for row in alone:
        difference = np.abs(pixels(tmp_path / "alone" / row["output"]) - pixels(tmp_path / "out" / row["output"]))
        assert difference.max() <= 2


def test_a_killed_run_is_taken_up(photos, tiny_model_dir, tmp_path):
    """By the same command, which gives the pictures of a run that nobody killed, and does none of them twice."""
    rows = [{"image": f"photo{number % 6}.png", "prompt": "x", "seed": number} for number in range(8)]
    table = write_table(photos / "many.csv", rows)
    words = ["eval/edit.py", "--model", tiny_model_dir, "--adapter", photos / "bridge", "--csv", table, "--steps", "8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command(*words[1:], "--out", whole)
    with started([*warm_python(), *words, "--out", killed]) as process:
        wait_until(lambda: len(list(killed.glob("*.png"))) >= 2, process)
    before = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.png")}
    assert 2 <= len(before) < 8
    assert not (killed / "results.csv").exists()

    command(*words[1:], "--out", killed)
    after = {path.name: path for path in killed.glob("*.png")}
    assert {name: path.read_bytes() for name, path in after.items()} == {
        path.name: path.read_bytes() for path in whole.glob("*.png")
    }
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    untimed = [{**row, "seconds": bool(row["seconds"])} for row in read(killed / "results.csv")]
    assert untimed == [{**row, "seconds": True} for row in read(whole / "results.csv")]


def test_what_changed_is_done_again_and_nothing_else(photos, tmp_path):
    rows = [{"id": number, "image": f"photo{number}.png", "prompt": f"p{number}"} for number in range(4)]
    table = write_table(tmp_path / "jobs.csv", rows)

    def run(common: str = "model", **options: Any) -> list[str]:
        editor = Copies()
        run_jobs(jobs_of(table, photos, **options), JobFiles(lambda _: {"model": common}), editor, tmp_path / "out")
        return editor.done

    assert run() == ["p0", "p1", "p2", "p3"]
    assert run() == []
    assert run(seed=0, count=1) == []  # said, and the same as not said
    first = read(tmp_path / "out/results.csv")
    assert [row["seconds"] for row in first] == ["0.500"] * 4
    rows[1]["prompt"] = "changed"
    rows.insert(0, {"id": "new", "image": "photo5.png", "prompt": "new"})
    write_table(table, rows)
    assert run() == ["new", "changed"]
    assert [row["row"] for row in read(tmp_path / "out/results.csv")] == ["1", "2", "3", "4", "5"]
    (tmp_path / "out" / first[2]["output"]).unlink()
    assert run() == ["p2"]
    assert len(run(steps=3)) == 5
    assert len(run(common="another model")) == 5
    assert run() == []


def test_the_key_is_of_contents(photos, tmp_path):
    image = (photos / "photo0.png").read_bytes()
    (tmp_path / "copy.png").write_bytes(image)
    (tmp_path / "photo0.png").write_bytes(image)
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    rows = [{"image": name, "prompt": "x"} for name in ("photo0.png", "copy.png", "photo0.png")]
    rows.append({"image": "photo0.png", "prompt": "x", "adapter": f"{tmp_path}/adapter.safetensors:0.5"})
    rows.append({"image": "photo0.png", "prompt": "x", "adapter": f"{tmp_path}/adapter.safetensors"})
    files, jobs = JobFiles(nothing), jobs_of(write_table(tmp_path / "jobs.csv", rows), tmp_path)
    a, b, c, d, e = (files.key(job) for job in jobs)
    assert a.key == b.key == c.key
    assert (a.outputs, b.outputs) == ((f"photo0-{a.key}.png",), (f"copy-{a.key}.png",))
    assert len({a.key, d.key, e.key}) == 3
    save_file({"weight": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert JobFiles(nothing).key(jobs[3]).key != d.key
    editor = Copies()
    summary = run_jobs(jobs[:3], files, editor, tmp_path / "out")
    assert len(editor.done) == 2  # the third is the first
    assert (summary.num_rows, summary.num_edited) == (3, 2)
    assert [row["output"] for row in read(tmp_path / "out/results.csv")] == [*a.outputs, *b.outputs, *a.outputs]


FLOW, BRIDGE = {"adapter": "flow", "size": "64x64"}, {"adapter": "bridge", "size": "64x64"}
MASKED = {"mode": "inpaint", "mask": "mask.png"}


@pytest.mark.parametrize(
    ("row", "options", "key", "same"),
    [
        pytest.param(FLOW, {}, "32639ba1c64196eb", True, id="size and adapter"),
        pytest.param(BRIDGE | MASKED, {}, "c93cc880df631710", True, id="a bridge has no strength"),
        pytest.param(
            {"adapter": "bridge"},
            {"geometry": Geometry(64 * 64), "size": Size(64, 64)},
            *("60dbec14e00f8bde", True),
            id="evaluation",
        ),
        pytest.param(
            *({}, {"geometry": Geometry(64 * 64), "size": Size(64, 64)}, "33c0a6b6f890236a", True),
            id="evaluation of the base",
        ),
        pytest.param({"adapter": "flow"}, {}, "b514af12024b6734", False, id="shown whole"),
        pytest.param({}, {}, "266a1be0d154f687", False, id="no option"),
        pytest.param({"size": "256x256"}, {}, "d6489ef0ae767fc7", False, id="size alone"),
        pytest.param(
            *({"mode": "turbo", "adapter": "lightning", "size": "64x64"}, {}, "195a7fd3737b3ac6", False),
            id="adapter of others",
        ),
        pytest.param(FLOW | {"mode": "img2img"}, {}, "c85d37f329847755", False, id="strength"),
        pytest.param(FLOW | MASKED, {}, "544c6a4a7f96b5a5", False, id="mask and strength"),
        pytest.param(
            *(BRIDGE | MASKED | {"sampler": "bridge-stochastic"}, {}, "66741c671ffc4b6b", False), id="stochastic bridge"
        ),
    ],
)
def test_a_key_is_the_earlier_one_where_the_pictures_are(tiny_model_dir, tmp_path, row, options, key, same):
    """Keys as they were before sizes were upstream's, strengths shares of noise and pictures shown whole; of files' names."""
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    if "adapter" in row:
        headers = {"flow": {"objective": "flow"}, "bridge": {"objective": "lbm", "loss": "{}"}, "lightning": None}
        header = headers[row["adapter"]]
        (adapter := tmp_path / row["adapter"]).mkdir()
        header = header and header | {"geometry": json.dumps({"max_pixels": 64 * 64})}
        save_file({"weight": torch.zeros(1)}, adapter / "adapter_model.safetensors", header)
        row = row | {"adapter": str(adapter)}
    table = write_table(tmp_path / "jobs.csv", [{"image": "photo.png", "prompt": "x"} | row])
    (job,) = jobs_of(table, tmp_path, **options)
    revised = Editor(ModelDirectory(tiny_model_dir)).revised

    def digest(path: Path) -> str:
        return f"{path.parent.name}/{path.name}" if path.suffix == ".safetensors" else path.name

    assert (JobFiles(revised, digest=digest).key(job).key == key) == same


def test_a_tables_key_has_what_a_base_does_otherwise(photos, tiny_model_dir, tmp_path, monkeypatch):
    table = TableOptions(write_table(tmp_path / "jobs.csv", [{"image": "photo0.png", "prompt": "x"}]), photos)
    monkeypatch.setattr("eval.tables.engine.open_model", lambda *_: Copies())
    for revised in ({}, {"sizes": "upstream"}):
        monkeypatch.setattr(Copies, "revised", lambda *_, revised=revised: revised)
        edit_table(table, {}, ModelOptions("copies"), PlaceOptions("cpu", "float32"), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_a_row_with_a_mask_keeps_the_files_transparency(tiny_model_dir, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "clear.png")
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:, 48:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    table = write_table(tmp_path / "jobs.csv", [{"image": "clear.png", "prompt": "x"} | MASKED])
    limits = ["--max-pixels", 4096, "--vision-pixels", 3136, "--steps", 1, "--cfg-scale", 1]
    command("--model", tiny_model_dir, "--csv", table, *limits, "--out", tmp_path / "out")
    (made,) = (np.asarray(Image.open(path)) for path in (tmp_path / "out").glob("*.png"))
    assert np.array_equal(made[..., 3], values[..., 3])
    assert np.array_equal(made[:, :48], values[:, :48])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_failure_costs_its_own_row_alone(photos, tmp_path, capsys, batch_size):
    prompts = ["p0", "memory", "p2", "bug", "memory of the machine", "bug"]
    rows = [{"image": f"photo{number}.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    jobs, editor = jobs_of(write_table(tmp_path / "jobs.csv", rows), photos), Copies()
    summary = run_jobs(jobs, JobFiles(nothing), editor, tmp_path / "out", batch_size)
    assert [row["prompt"] for row in read(tmp_path / "out/results.csv")] == ["p0", "p2"]
    failed = read(tmp_path / "out/failed.csv")
    assert [row["row"] for row in failed] == ["2", "4", "5", "6"]
    assert "can't allocate memory" in failed[2]["reason"]
    assert failed[2]["reason"].startswith("out of memory (")
    assert failed[0]["reason"].startswith("out of memory (CUDA out of memory. Tried to allocate 9 GiB): a smaller size")
    assert failed[1]["reason"] == "ZeroDivisionError: a mistake of the program"
    assert summary.bugs == 2
    shown = capsys.readouterr().err
    assert shown.count("Traceback") == 2
    assert f"row 2 ({photos}/photo1.png): out of memory" in shown


@pytest.fixture
def editors(monkeypatch) -> list[Editor]:
    """Those that tables have opened."""
    opened, original = [], open_model
    monkeypatch.setattr("eval.tables.engine.open_model", lambda *args: opened.append(original(*args)) or opened[-1])
    return opened


def test_an_offloaded_model_is_moved_once_a_window(photos, tiny_model_dir, tmp_path, editors):
    """The pictures of a model that stays, bit for bit, though two adapters alternate."""
    write_adapter(photos / "flow", tiny_model_dir, "flow", SMALL)
    adapters = [str(photos / name) for name in ("bridge", "flow")]
    rows = [
        {
            "image": f"photo{number}.png",
            "prompt": "x",
            "adapter": adapters[number % 2],
            "steps": 2,
            "cfg_scale": 1 if number % 2 else "",
        }
        for number in range(4)
    ]
    table = TableOptions(write_table(photos / "alternating.csv", rows), photos, window=2)
    model = ModelOptions(str(tiny_model_dir))
    for name, offload in [("here", "none"), ("away", "model")]:
        edit_table(table, {}, model, PlaceOptions("cpu", "float32", offload=offload), tmp_path / name)
    here, away = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("here", "away")
    )
    assert len(here) == 4
    assert away == here
    here, away = (editor.components.moves for editor in editors)
    assert here == {"vae": 1, "prompt_encoder": 1, "denoiser": 1}
    assert away == {"vae": 3, "prompt_encoder": 2, "denoiser": 2}  # two windows; the VAE stays between them


@pytest.mark.parametrize("window", [1, 4, 16])
def test_a_window_loses_no_row_but_the_bad_one(photos, tmp_path, window):
    prompts = ["p0", "memory", "p2", "p3", "p4", "bug"]
    rows = [{"image": f"photo{number}.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    jobs, handed = jobs_of(write_table(tmp_path / "jobs.csv", rows), photos), []

    class Watched(Copies):
        def edit_groups(self, groups):
            handed.append(sum(map(len, groups)))
            return super().edit_groups(groups)

    summary = run_jobs(jobs, JobFiles(nothing), Watched(), tmp_path / "out", window=window)
    assert [row["prompt"] for row in read(tmp_path / "out/results.csv")] == ["p0", "p2", "p3", "p4"]
    assert [row.number for row in summary.failures] == [2, 6]
    assert handed[0] == min(window, 6)
    assert len(handed) <= 11  # every half of a half: 2 n - 1


def test_a_mistake_of_the_program_is_never_skipped(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.tables.engine.open_model", lambda model, placement: Copies())
    rows = [{"image": f"photo{number}.png", "prompt": prompt} for number, prompt in enumerate(["p0", "bug", "memory"])]
    rows = write_table(tmp_path / "jobs.csv", rows)
    table = TableOptions(rows, photos, on_error="skip")
    with pytest.raises(typer.Exit) as ended:
        edit_table(table, {}, ModelOptions("copies"), PlaceOptions("cpu", "float32"), tmp_path / "out")
    assert ended.value.exit_code == 1
    assert "2 of 3 rows failed" in capsys.readouterr().err
    assert [row["prompt"] for row in read(tmp_path / "out/results.csv")] == ["p0"]


def test_no_model_is_asked_for_if_no_row_can_be_edited(photos, tmp_path):
    """Else one that is only a hub id would be downloaded."""

    class Absent(Copies):
        fingerprint = property(lambda _: (_ for _ in ()).throw(InputError("the hub cannot be reached")))

    rows = [{"image": "photo0.png", "prompt": "x", "sampler": "lightning"}]
    jobs = jobs_of(write_table(tmp_path / "jobs.csv", rows), photos)
    summary = run_jobs(jobs, JobFiles(nothing), Absent(), tmp_path / "out")
    assert summary.failures[0].reason.startswith("copies has no sampler=lightning")
    jobs = jobs_of(write_table(tmp_path / "jobs.csv", [*rows, {"image": "photo0.png", "prompt": "x"}]), photos)
    with pytest.raises(InputError, match="the hub cannot be reached"):  # of all rows, not of one
        run_jobs(jobs, JobFiles(nothing), Absent(), tmp_path / "other")


def test_a_limit_leaves_the_other_sizes_of_each_rows_adapter(photos, tiny_model_dir):
    other = Geometry(max_pixels=96 * 96, vision_pixels=64 * 64)
    write_adapter(photos / "other", tiny_model_dir, "lbm", other)
    editor, image = (
        Editor(ModelDirectory(tiny_model_dir), limits=SizeLimits(max_pixels=32 * 64)),
        Image.new("RGB", (64, 64)),
    )
    for name, own in {"bridge": SMALL, "other": other}.items():
        job = editor.prepare(EditRequest("x", [image], adapters=[AdapterUse(photos / name)]))
        assert job.geometry == Geometry(32 * 64, own.vision_pixels)
    with pytest.raises(InputError, match="max_pixels must be at least 1024"):
        SizeLimits(max_pixels=10)


def test_images_wait_in_a_bounded_window(photos, tmp_path):
    """Of two shapes in turn, so that groups fill slowly; and a rare third, which must not wait for ever."""
    names = ["rare.png", *["photo0.png", "wide.png"] * 40]
    write_image(photos / "rare.png", 1, 64, 96)
    rows = [{"image": name, "prompt": str(number)} for number, name in enumerate(names)]
    jobs, editor, open_now, most = jobs_of(write_table(tmp_path / "jobs.csv", rows), photos), Copies(), [0], [0]

    class Counted(JobFiles):
        def load(self, job: Job) -> EditRequest:
            open_now[0] += 1
            most.append(open_now[0] - len(editor.done))
            return super().load(job)

    run_jobs(jobs, Counted(nothing), editor, tmp_path / "out", batch_size=4)
    assert set(editor.together) == {4}
    assert max(most) <= WAITING * 4 + 4 + 2 * READERS + 1
    assert [row["prompt"] for row in read(tmp_path / "out/results.csv")] == [str(n) for n in range(81)]


def test_an_overlay_is_laid_over_the_image_that_is_edited(photos, tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "logo.png")
    (tmp_path / "note.txt").write_text("Grüße", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    write_image(tmp_path / "photo.png", 0, 200, 100)
    style = {"position": "top-left", "overlay_size": "0.5"}
    rows = [
        {"image": "photo.png", "prompt": "x", "overlay_image": "logo.png", **style},
        {"image": "photo.png", "prompt": "x", "overlay_text": "note.txt"},
        {"image": "photo.png", "prompt": "x", "overlay_text": "latin.txt"},
        {"image": "photo.png", "prompt": "x", "overlay_text": "note.txt", "id": "other", "seed": "5"},
        {"image": "photo.png", "prompt": "x", "overlay_text": "note.txt", "overlay_image": "logo.png"},
    ]
    jobs, out = jobs_of(write_table(tmp_path / "jobs.csv", rows), tmp_path), tmp_path / "out"
    summary = run_jobs(jobs, JobFiles(nothing), Copies(), out)
    results, photo = read(out / "results.csv"), pixels(tmp_path / "photo.png")
    logo, note, same_note = (pixels(out / row["output"]) for row in results)
    # half of the width and height at most, 2 % of the shorter side free around it: 100 x 50 at (2, 2)
    assert (logo[2:52, 2:102] == [255, 0, 0]).all()
    outside = np.ones(photo.shape[:2], dtype=bool)
    outside[2:52, 2:102] = False
    assert (logo[outside] == photo[outside]).all()
    assert 20 < (note != photo).any(axis=2).sum() < 200 * 100 / 2
    assert (note == same_note).all()  # whatever the row's id and seed
    assert [row.reason for row in summary.failures] == [
        "the overlay's text is not UTF-8 text: save it as UTF-8",
        "a row may fill only one of overlay_text and overlay_image; this one fills both",
    ]
    settings = read_png(out / results[0]["output"])
    assert settings["overlay"] == {"content": "overlay_image", **style}
    assert read_png(out / results[1]["output"])["overlay"] == {
        "content": "overlay_text",
        "fonts": [file_digest(DEFAULT_FONT)],
    }
    with pytest.raises(InputError, match="a table's row with an overlay, and the image under edit was not saved"):
        command(
            "--repeat", out / results[1]["output"], "--image", tmp_path / "photo.png", "--out", tmp_path / "again.png"
        )
    assert [each["name"] for each in settings["images"]] == ["photo.png", "logo.png"]


def test_every_format_and_kind_of_cell(photos, tmp_path):
    """One row in each format, the images named in each way; 7.0 is what pandas makes of 7."""
    row = {"image": ["photo0.png", "photo1.png"], "prompt": "x", "seed": 7.0, "strength": None, "steps": 2}
    text = {"image": '["photo0.png", "photo1.png"]', "prompt": "x", "seed": "7", "strength": "", "steps": "2.0"}
    text["steps"] = "2"
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "jobs.json").write_text(json.dumps([row]))
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "jobs.parquet")
    write_table(tmp_path / "jobs.csv", [text])
    cells = ["image\timage_2\tprompt\tseed\tsteps", "photo0.png\tphoto1.png\tx\t7\t2"]
    (tmp_path / "jobs.tsv").write_text("\n".join(cells), encoding="utf-8")
    keys = set()
    for suffix in ("jsonl", "json", "parquet", "csv", "tsv"):
        (job,) = jobs_of(tmp_path / f"jobs.{suffix}", photos, steps=9, cfg_scale=2.0)
        assert job.images == (photos / "photo0.png", photos / "photo1.png")
        assert job.knobs == {"prompt": "x", "seed": 7, "steps": 2, "cfg_scale": 2.0}
        keys.add(JobFiles(nothing).key(job).key)
    assert len(keys) == 1


def test_a_cell_takes_the_place_of_the_option(photos, tmp_path):
    rows = [
        {"image": "photo0.png", "aspect": "16:9", "mode": "focus", "focus": "0.5,0.5,0.1", "control": ""},
        {"image": "photo0.png", "size": "64x32", "mode": "control", "control": '["canny:0.5", "lines"]'},
        {"image": "photo0.png", "mode": "variation", "negative_prompt": "dull"},
    ]
    focus, control, variation = jobs_of(write_table(tmp_path / "jobs.csv", rows), photos, prompt="p", size=Size(96, 96))
    assert (focus.placeholder().aspect, focus.placeholder().size) == ("16:9", None)
    assert focus.placeholder().focus.radius == 0.1
    assert control.placeholder().size == (32, 64)
    assert [(each.kind, each.strength) for each in control.placeholder().controls] == [("canny", 0.5), ("lines", 1.0)]
    assert variation.placeholder().prompt == ""
    assert variation.placeholder().negative_prompt == "dull"


def test_coco_ids(photos, tmp_path):
    write_image(tmp_path / "000000000042.png", 0)
    write_image(tmp_path / "street.png", 1)
    rows = [{"image_id": each, "prompt": "x"} for each in ("42", "7", "8")]
    table = write_table(tmp_path / "jobs.csv", rows)
    found = jobs_of(table, tmp_path, {"7": "street.png"})
    assert [each.images[0].name for each in found[:2]] == ["000000000042.png", "street.png"]
    assert isinstance(found[2], RejectedRow)
    assert found[2].reason == f"there is no image '8' in {tmp_path}, with or without an ending"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,prompt\n", "jobs.csv has no rows"),
        (b"", "jobs.csv has no column image or image_id"),
        (b"prompt\nx\n", "jobs.csv has no column image or image_id"),
        (b"image,promt\nphoto0.png,x\n", "unknown column 'promt' in .*did you mean 'prompt'"),
        (b"image,prompt,edit_image\na,b,c\n", "unknown column 'edit_image'"),
        ("image,prompt\nphoto0.png,x\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    ],
)
def test_a_wrong_table_is_a_sentence(photos, tmp_path, content, message):
    (tmp_path / "jobs.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        command("--model", "none/none", "--csv", tmp_path / "jobs.csv", "--root", photos, "--out", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_columns_can_be_ignored_and_bytes_that_are_no_text_cost_a_row(photos, tmp_path):
    (tmp_path / "jobs.csv").write_bytes(b"image,prompt,caption\nphoto0.png,x,\xff\nphoto1.png,\xff,ok\n")
    photographs = Photographs(photos, {})
    good, bad = read_jobs(tmp_path / "jobs.csv", photos, photographs, {}, ignore_columns=True)
    assert isinstance(good, Job)
    assert bad.reason == "prompt is not UTF-8 text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", "0"], r"steps must be in \[1, 1000\], got 0"),
        (["--mode", "inpaint", "--strength", "2"], r"strength must be in \(0, 1\], got 2.0"),
        (["--image", "a.png"], "leave out --image, --mask and --repeat"),
        (["--csv", "none.csv"], "there is no dataset at none.csv"),
        (["--root", "none"], "none is not a folder"),
        (["--out", "jobs.csv"], "jobs.csv is a file: with --csv it is the folder of results"),
        (["--out", "jobs.csv/out"], "cannot make the folder"),
        (["--font", "jobs.csv"], "jobs.csv"),
    ],
)
def test_wrong_options_are_found_first(photos, tiny_model_dir, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "jobs.csv", [{"image": "photo0.png", "prompt": "x"}])
    base = ["--model", tiny_model_dir, "--csv", table, "--root", photos, "--out", "out"]
    with pytest.raises(InputError, match=message) as error:
        command(*base, *changes)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_share_the_rows(photos, tiny_model_dir, tmp_path):
    rows = [{"image": f"photo{number % 6}.png", "prompt": "x", "seed": number} for number in range(7)]
    rows.insert(3, {"image": "missing.png", "prompt": "x", "seed": 0})
    table = write_table(photos / "shared.csv", rows)
    words = ["--model", tiny_model_dir, "--adapter", photos / "bridge", "--csv", table, "--steps", "1"]
    done = launch(2, "eval/edit.py", *words, "--on-error", "skip", "--out", tmp_path / "two")
    assert done.stdout.count("results.csv: 7 of 8 rows, 7 edited now") == 1
    assert done.stderr.count("missing.png): no such file") == 1
    command(*words, "--on-error", "skip", "--out", tmp_path / "one")
    untimed = [[{**row, "seconds": ""} for row in read(tmp_path / name / "results.csv")] for name in ("one", "two")]
    assert untimed[0] == untimed[1]
    assert read(tmp_path / "one/failed.csv") == read(tmp_path / "two/failed.csv")
    for row in untimed[0]:
        assert (tmp_path / "one" / row["output"]).read_bytes() == (tmp_path / "two" / row["output"]).read_bytes()
    shares = [(tmp_path / f"two/.seconds-{rank}.jsonl").read_text().count("\n") for rank in range(2)]
    assert sorted(shares) == [3, 4]
