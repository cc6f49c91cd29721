"""What the model and the adapter are for: pictures; and a training step against DiffSynth's."""

import json
import runpy
import sys
from typing import Any

import numpy as np
from PIL import Image

from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry
from data_prep.rows.images import open_image
from eval.qwen.editor import Editor
from eval.request.knobs import AdapterUse
from eval.request.placement import make_placement
from eval.request.provenance import write_png
from eval.request.request import EditRequest, EditResult
from scripts.acceptance.findings import ROOT, Findings, Options
from scripts.acceptance.training import train, write_data

SPEED_UP = 15.0
"""Aim: four steps of a bridge against forty with guidance, from request to picture."""
AIMS = {"full": 1.46, "auto": 1.94}
"""Samples/s over DiffSynth's, as one H200 had them (docs/performance.md); `auto` with what it chose there."""
FLAT = 2.0
"""Standard deviation, of 255, below which a picture shows nothing."""


def check_edits(options: Options, findings: Findings) -> None:
    """A held-out photograph by the base model, by Lightning if there is one, and by the trained bridge in one and four steps."""
    adapter = train(options, "lbm", "lbm")
    row = json.loads((write_data(options) / "validation.json").read_text())[0]
    source, target = (open_image(options.out / "data" / row[name]) for name in ("edit_image", "image"))
    geometry = Geometry(options.side**2, options.vision_pixels)
    editor = Editor(ModelDirectory.resolve(options.model), make_placement(options.device, options.dtype), geometry)

    def edit(name: str, **values: Any) -> EditResult:
        editor.forget()  # its seconds are those of a picture that is new
        (result,) = editor.edit(EditRequest(row["prompt"], [source], **values))
        file = options.out / "edits" / f"{name.replace(' ', '-')}.png"
        file.parent.mkdir(exist_ok=True)
        write_png(result, [(row["edit_image"], "")], file)
        return result

    bridge = (AdapterUse(adapter),)
    edit("warm up", adapters=bridge, steps=1)
    wanted: dict[str, dict[str, Any]] = {f"base, {options.base_steps} steps": {"steps": options.base_steps}}
    if options.lightning:
        wanted["Lightning, 4 steps"] = {"mode": "turbo", "steps": 4, "adapters": (AdapterUse(options.lightning),)}
    wanted |= {f"bridge, {steps} step(s)": {"adapters": bridge, "steps": steps} for steps in (1, 4)}
    for name, picture in {"source": source, "target": target}.items():
        picture.save(options.out / "edits" / f"{name}.png")
        findings.pictures.append((str(options.out / "edits" / f"{name}.png"), name))
    made = {name: edit(name, **values) for name, values in wanted.items()}
    for name, result in made.items():
        spread = float(np.asarray(result.image, dtype=float).std())
        good = result.image.size == source.size and spread > FLAT
        findings.holds(
            f"{name}: a picture of {options.side} x {options.side}", good, spread, f"standard deviation > {FLAT}"
        )
        findings.figure(f"{name}: seconds", result.seconds)
        findings.figure(f"{name}: PSNR to the target, dB", decibels(result.image, target))
        findings.pictures.append((str(options.out / "edits" / f"{name.replace(' ', '-')}.png"), name))
    again = edit("again", adapters=bridge, steps=1)
    one = made["bridge, 1 step(s)"]
    findings.at_most("the same request again, largest difference of a pixel", largest(again.image, one.image), 0)
    strong = edit("ten times the weight", adapters=(AdapterUse(adapter, 10.0),), steps=1)
    findings.figure(
        "the adapter at ten times its weight, largest difference of a pixel", largest(strong.image, one.image)
    )
    slow, fast = made[f"base, {options.base_steps} steps"].seconds, made["bridge, 4 step(s)"].seconds
    findings.figure(
        f"{options.base_steps} steps with guidance over 4 of the bridge, seconds",
        slow / fast,
        f"{SPEED_UP:g} or more on a GPU",
    )


def largest(mine: Image.Image, theirs: Image.Image) -> int:
    """Largest difference of a pixel, of 255."""
    return int(np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max())


def decibels(mine: Image.Image, theirs: Image.Image) -> float:
    """PSNR."""
    error = np.square(np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def check_speed(options: Options, findings: Findings) -> None:
    """`scripts/bench/train_step.py`, which has random weights of the same sizes: speed does not depend on their values."""
    file = options.out / "train_step.json"
    small = ["--tiny", "--layers", "1", "--rounds", "1", "--steps", "1"] if options.tiny else ["--side", options.side]
    rows = ["--rows", "theirs,full,auto", "--rank", options.rank, "--seconds", 1200]
    bench = ROOT / "scripts/bench/train_step.py"
    sys.argv = [str(word) for word in (bench, *rows, *small, "--device", options.device, "--json", file)]
    try:
        runpy.run_path(str(bench), run_name="__main__")
    except SystemExit as end:
        findings.holds("every row was measured", not end.code, f"exit code {end.code or 0}")
    found = json.loads(file.read_text())["rows"]
    for name, row in found.items():
        if "failed" in row:
            findings.holds(f"{name}: measured", False, row["failed"])
            continue
        findings.figure(f"{name}: samples/s", row["samples/s"])
        if name == "theirs":
            continue
        if options.device == "cuda":
            findings.holds(f"{name}: over DiffSynth's", row["ratio"] >= 1, row["ratio"], f"≥ 1, one H200 {AIMS[name]}")
        else:
            findings.figure(f"{name}: over DiffSynth's", row["ratio"])
