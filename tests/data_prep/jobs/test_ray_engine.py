"""The same command on Ray makes the same dataset, and either engine goes on where the other was."""

import pytest
from PIL import Image

from scripts.photographs import SKIMAGE_DATA
from tests.commands import run_script
from tests.pictures import contents

SYNTH = ("--recipes", "add_rain,grade", "--per-image", 4, "--size", 64, "--validation", 0, "--processes", 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_makes_what_processes_make(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut.png", "coffee.png", "chelsea.png"):
        Image.open(SKIMAGE_DATA / name).convert("RGB").resize((96, 96)).save(photos / name)
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = {}
    for engine in ("local", "ray"):
        arguments = ("data_prep/run.py", "synth", "--images", photos, "--out", tmp_path / engine, *SYNTH)
        done[engine] = run_script(*arguments, "--engine", engine, check=False)
        assert done[engine].returncode == 2, done[engine].stderr
    assert done["ray"].stdout.splitlines()[0].startswith("12 rows in ")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert "broken.png" in done["ray"].stderr
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("*.png")}
    run_script(*arguments, "--engine", "local", "--on-error", "skip")
    assert any(path.stat().st_mtime_ns == time for path, time in made.items())  # parts without the broken one stay
