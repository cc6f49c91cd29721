"""Bad input of every kind, planted among good rows: each is rejected with its row, file and reason, the rest survives.

Formats that are unusual but sound are used, with the right pixels. Tables have their own tests (`test_build_table.py`).
"""

import ctypes
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from data_prep.rows.images import open_image
from tests.children import started, wait_until
from tests.pictures import contents, dataset, picture, prepare, rejected, save

pytestmark = pytest.mark.slow

SIZE = (64, 48)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def truncate(path: Path) -> None:
    data = save(path, size=(256, 256)).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def animate(path: Path) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue", "green")]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )


def turn(path: Path) -> None:
    """A tall photograph stored on its side: white above, black below when upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:, :32] = 255
    Image.fromarray(stored).save(path, quality=95, exif=exif)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((48, 64), 0x8080, np.uint16)).save(path)


def save_as_png(path: Path) -> None:
    with path.open("wb") as file:
        picture(3, SIZE).save(file, "PNG")


BAD = {
    "truncated.jpg": (truncate, "truncated"),
    "zero bytes.png": (lambda path: path.write_bytes(b""), "the file is empty (zero bytes)"),
    "page.jpg": (lambda path: path.write_text("<html>404 not found</html>"), "not an image"),
    "1x1.png": (lambda path: save(path, size=(1, 1)), "1x1 is too small"),
    "long.png": (lambda path: Image.new("1", (30_000, 20)).save(path), "30000x20 is too thin"),
    "huge.png": (lambda path: path.write_bytes(png_header(30_000, 30_000)), "decompression-bomb limit"),
    "bomb.png": (lambda path: path.write_bytes(png_header(60_000, 60_000)), "decompression-bomb limit"),
    "no pixels.png": (lambda path: path.write_bytes(png_header(64, 48)), "cannot be read"),
    "loop.png": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), "no such file"),
    "float.tiff": (lambda path: Image.fromarray(np.ones((48, 64), np.float32)).save(path), "floating-point pixels"),
    "two.png": (lambda path: [save(path), save(path.with_suffix(".jpg"))], "has the same name as two.jpg"),
}
"""Name -> how to make it, and what is said of it."""

GOOD = {
    "png called.jpg": (save_as_png, lambda pixels: np.array_equal(pixels, np.asarray(picture(3, SIZE)))),
    "cmyk.jpg": (
        lambda path: Image.new("CMYK", SIZE, (255, 0, 0, 0)).save(path),
        lambda pixels: (pixels[..., 1] > 200).all(),
    ),
    "16 bit.png": (sixteen_bits, lambda pixels: (pixels == 0x80).all()),
    "palette.png": (lambda path: Image.new("P", SIZE, 0).save(path), lambda pixels: (pixels == 0).all()),
    "alpha.png": (lambda path: Image.new("RGBA", SIZE, (9, 9, 9, 0)).save(path), lambda pixels: (pixels == 255).all()),
    "moving.gif": (animate, lambda pixels: (pixels == (255, 0, 0)).all()),
    "moving too.webp": (animate, lambda pixels: (pixels == (255, 0, 0)).all()),
    "turned.jpg": (
        turn,
        lambda pixels: pixels.shape == (64, 48, 3) and pixels[:30].min() > 200 and pixels[34:].max() < 50,
    ),
    "wide.png": (lambda path: Image.new("L", (30_000, 300), 7).save(path), lambda pixels: (pixels == 7).all()),
    "café 写真 🙂.png": (save, lambda pixels: True),
}
"""Name -> how to make it, and what its pixels must be as everything reads them."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One folder with all of it as targets; one more missing on either side, and a wrong mask."""
    folder = tmp_path_factory.mktemp("planted")
    for name, (make, _) in (BAD | GOOD).items():
        save((folder / "source" / name).with_suffix(".png"))
        (folder / "target").mkdir(exist_ok=True)
        make(folder / "target" / name)
    save(folder / "source/only source.png")
    save(folder / "target/broken source.png")
    truncate(folder / "source/broken source.jpg")
    save(folder / "target/only target.png")
    for stem in ("wide mask", "broken mask"):
        save(folder / "source" / f"{stem}.png")
        save(folder / "target" / f"{stem}.png", size=SIZE)
    save(folder / "mask/wide mask.png", size=(64, 32))
    truncate(folder / "mask/broken mask.png")
    (folder / "target/round").symlink_to(folder / "target")
    done = prepare("pairs", "--folder", folder, "--prompt", "p", check=False)
    return folder, done


def number_of(folder: Path, stem: str) -> int:
    """The row: the place of the stem among all, sorted."""
    stems = {path.stem for part in ("source", "target") for path in (folder / part).iterdir() if path.suffix}
    return sorted(stems).index(stem) + 1


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_rejected_with_row_path_and_reason(name, planted):
    folder, _ = planted
    row, path, reason = rejected(folder)[Path(name).stem]
    assert (row, path) == (number_of(folder, Path(name).stem), name)
    assert BAD[name][1] in reason
    assert len(reason) < 300


@pytest.mark.parametrize(
    ("stem", "path", "reason"),
    [
        ("only source", "only source.png", "there is no file of this name in {folder}/target"),
        ("only target", "only target.png", "there is no file of this name in {folder}/source"),
        ("broken source", "broken source.jpg", "truncated"),
        ("wide mask", "wide mask.png", "the mask and its image have different shapes: 64x32, its image is 64x48"),
        ("broken mask", "broken mask.png", "truncated"),
    ],
)
def test_bad_pairs_are_rejected_with_row_path_and_reason(stem, path, reason, planted):
    folder, _ = planted
    found = rejected(folder)[stem]
    assert found[:2] == (number_of(folder, stem), path)
    assert reason.format(folder=folder) in found[2]


@pytest.mark.parametrize("name", GOOD)
def test_unusual_files_are_used(name, planted):
    folder, _ = planted
    (row,) = (row for row in dataset(folder) if row["id"] == Path(name).stem)
    assert row["image"] == f"target/{name}"
    assert GOOD[name][1](np.asarray(open_image(folder / row["image"])))


def test_nothing_is_lost_and_the_exit_code_says_it(planted):
    folder, done = planted
    assert {row["id"] for row in dataset(folder)} == {Path(name).stem for name in GOOD}
    assert len(rejected(folder)) == len(BAD) + 5
    assert done.returncode == 2
    assert f"{len(BAD) + 5} could not be used, all listed in {folder}/rejected.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_skip_the_exit_code_is_0_and_the_files_are_the_same(planted):
    folder, _ = planted
    before = [(folder / name).read_bytes() for name in ("dataset.jsonl", "rejected.jsonl")]
    done = prepare("pairs", "--folder", folder, "--prompt", "p", "--on-error", "skip", "--processes", 2)
    assert f"{len(BAD) + 5} could not be used and are listed in" in done.stdout
    assert [(folder / name).read_bytes() for name in ("dataset.jsonl", "rejected.jsonl")] == before


def test_folders_without_files_and_rows_without_use_are_told(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    done = prepare("pairs", "--folder", tmp_path, "--prompt", "p", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no image file in {tmp_path}/target" in done.stderr
    save(tmp_path / "source/a.png")
    (tmp_path / "target/a.png").touch()
    done = prepare("pairs", "--folder", tmp_path, "--prompt", "p", "--on-error", "skip", check=False)
    assert done.returncode == 2
    assert "row 1" in done.stderr


def test_accents_written_in_two_ways_are_one_name(tmp_path):
    save(tmp_path / "source/cafe\u0301.png")
    save(tmp_path / "target/caf\u00e9.png")
    prepare("pairs", "--folder", tmp_path, "--prompt", "p")
    (row,) = dataset(tmp_path)
    assert (tmp_path / row["edit_image"]).is_file()
    assert (tmp_path / row["image"]).is_file()


def test_names_that_are_not_utf8_are_rejected(tmp_path):
    for part in ("source", "target"):
        data = save(tmp_path / part / "good.png").read_bytes()
        Path(os.fsdecode(os.fsencode(tmp_path / part) + b"/caf\xe9.png")).write_bytes(data)
    done = prepare("pairs", "--folder", tmp_path, "--prompt", "p", "--on-error", "skip")
    assert done.returncode == 0
    assert [row["id"] for row in dataset(tmp_path)] == ["good"]
    (found,) = rejected(tmp_path).values()
    assert "name is not UTF-8" in found[2]


def obey_permissions() -> None:
    """For `preexec_fn`: root without the capabilities that let it read everything."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: not even a program that root starts has it


def test_files_and_folders_without_permission(tmp_path):
    for stem in ("closed", "open"):
        save(tmp_path / "source" / f"{stem}.png")
        save(tmp_path / "target" / f"{stem}.png")
    closed = tmp_path / "target/closed.png"
    closed.chmod(0)
    obedient: dict[str, Any] = {"preexec_fn": obey_permissions} if os.getuid() == 0 else {}
    if subprocess.run(["cat", closed], capture_output=True, **obedient).returncode == 0:
        pytest.skip("this root cannot be kept from reading everything")
    options = ("pairs", "--folder", tmp_path, "--prompt", "p", "--on-error", "skip")
    prepare(*options, **obedient)
    assert [row["id"] for row in dataset(tmp_path)] == ["open"]
    assert rejected(tmp_path) == {"closed": (1, "closed.png", "cannot be read: Permission denied")}
    (tmp_path / "target/more").mkdir(mode=0)
    done = prepare(*options, check=False, **obedient)
    assert done.returncode == 2
    assert f"the folder {tmp_path}/target/more cannot be read: Permission denied" in done.stderr
    (tmp_path / "target/more").chmod(0o700)


def test_a_killed_build_continues_to_the_same_bytes(tmp_path):
    """Killed with its workers by SIGKILL, then run again with another number of processes."""
    cells = [{"bytes": save(tmp_path / f"{n}.webp", n, (192, 192)).read_bytes(), "path": None} for n in range(3)]
    rows = [{"image": cells[n % 3], "edit_image": cells[(n + 1) % 3], "prompt": f"p {n}"} for n in range(90)]
    rows[60]["image"] = {"bytes": b"broken", "path": None}
    table = datasets.Dataset.from_list(rows)
    table = table.cast_column("image", datasets.Image()).cast_column("edit_image", datasets.Image())
    table.save_to_disk(tmp_path / "data")
    options = ("hf", "--dataset", tmp_path / "data", "--on-error", "skip", "--out")
    prepare(*options, tmp_path / "whole")
    command = [sys.executable, "data_prep/run.py", *map(str, options), str(tmp_path / "cut"), "--processes", "2"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(command, **quiet) as running:
        wait_until(lambda: len(list(tmp_path.glob("cut/.parts/*.jsonl"))) >= 3, running)
    assert not (tmp_path / "cut/dataset.jsonl").exists()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/.parts/*.jsonl")}
    prepare(*options, tmp_path / "cut")
    assert len(contents(tmp_path / "whole")) == 2 + 2 * 89
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == date for path, date in done.items())
