"""The acceptance on the tiny model: whole, continued, and with faults that it must find."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from scripts.acceptance import fidelity  # here once, and not in every part
from scripts.acceptance.accept import PARTS, key_of, main, options_of, parse_arguments
from scripts.acceptance.findings import Findings, read
from tests.children import ROOT, run
from tests.commands import warm_programs
from train.model.denoiser import load_denoiser

SMALL = ["--side", "64", "--rank", "4", "--train-steps", "5", "--base-steps", "2", "--tiny", "--device", "cpu"]


def accept(model: Path, out: Path, *more: str) -> bool:
    """The command in this process, whose parts are forks of it."""
    return main(parse_arguments([str(model), "--out", str(out), *SMALL, *more]))


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    """All parts by the script, started in another folder than the repository's and given relative paths; where its results are,
    how it was started, and how it ended."""
    folder = tmp_path_factory.mktemp("acceptance")
    started: dict[str, Any] = {"env": os.environ | warm_programs(folder / "programs"), "cwd": folder}
    model = os.path.relpath(tiny_model_dir, folder)
    command = ["bash", str(ROOT / "scripts/accept.sh"), model, "--out", "out", *SMALL]
    return folder / "out", command, started, run(command, **started)


@pytest.mark.slow
def test_every_part_passes_on_the_tiny_model(whole):
    out, _, _, done = whole
    found = {part: read(out, part) for part in PARTS}
    assert {part: each.error or [c.name for c in each.checks if c.passed is False] for part, each in found.items()} == {
        part: [] for part in PARTS
    }
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(PARTS)} of {len(PARTS)} parts passed" in done.stdout
    page = (out / "accept.html").read_text()
    assert "FAILED</td>" not in page
    assert page.count("data:image/jpeg;base64,") == 5  # source, target, base, bridge in 1 and in 4 steps
    killed = next(check for check in found["resume"].checks if check.name.startswith("losses"))
    assert killed.value == 0


@pytest.mark.slow
def test_what_has_passed_is_not_done_again_unless_that_is_asked_for(whole):
    """A training begins anew then, and a run is killed again."""
    out, command, started, _ = whole
    again = ["files", "lbm", "resume"]
    first = [out / f"runs/{name}/config.yaml" for name in ("lbm", "sft", "killed")]
    made = [file.stat().st_mtime_ns for file in first]
    before = {file: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    done = run([*command, *(word for part in again for word in ("--again", part))], **started)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": passed before") == len(PARTS) - len(again)
    changed = {file.stem for file, when in before.items() if file.stat().st_mtime_ns != when}
    assert changed == set(again)
    assert [file.stat().st_mtime_ns == before for file, before in zip(first, made, strict=True)] == [False, True, False]


def test_options_of_edits_leave_the_other_parts_as_they_are(tiny_model_dir, tmp_path):
    words = [str(tiny_model_dir), "--out", str(tmp_path), *SMALL]
    one, other = (options_of(parse_arguments([*words, "--base-steps", steps])) for steps in ("2", "3"))
    assert {part for part in PARTS if key_of(one, part) != key_of(other, part)} == {"edits"}


def test_a_changed_weight_is_found_and_the_other_parts_go_on(tiny_model_dir, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_dir, model)
    assert accept(model, out, "--only", "files")
    file = model / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.ndim > 1)
    weights[name].flatten()[7] += 0.5
    save_file(weights, file)
    assert not accept(model, out, "--only", "files", "--only", "vae", "--again", "files")
    failed = [check for check in read(out, "files").checks if check.passed is False]
    assert [(check.name, check.value) for check in failed] == [
        ("SHA-256 is that of the first run in this folder", "vae/diffusion_pytorch_model.safetensors")
    ]
    assert read(out, "vae").passed
    assert "1 of 2 parts passed" in capsys.readouterr().out
    assert "FAILED" in (out / "accept.html").read_text()


def test_another_velocity_is_found(tiny_model_dir, tmp_path, monkeypatch):
    """Reference tokens modulated as the others are, as 2509 has it."""
    monkeypatch.setattr(fidelity, "load_denoiser", load_without_zero_cond_t)
    assert not accept(tiny_model_dir, tmp_path, "--only", "velocity")
    found = read(tmp_path, "velocity")
    assert [check.passed for check in found.checks if check.passed is not None] == [False, False]


def load_without_zero_cond_t(*arguments):
    denoiser = load_denoiser(*arguments)
    denoiser.zero_cond_t = False
    return denoiser


def test_a_part_that_dies_leaves_the_others(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "check_velocity", lambda *_: os.kill(os.getpid(), 9))
    monkeypatch.setattr(fidelity, "load_vae", lambda *_: 1 / 0)
    only = [word for part in ("velocity", "vae", "files") for word in ("--only", part)]
    assert not accept(tiny_model_dir, tmp_path, *only)
    assert "ended from outside" in read(tmp_path, "velocity").error
    assert read(tmp_path, "vae").error.startswith("ZeroDivisionError")
    assert read(tmp_path, "files").passed
    assert "division by zero" in (tmp_path / "logs/vae.log").read_text()
    assert "1 of 3 parts passed" in capsys.readouterr().out


def test_a_command_that_fails_is_quoted(tiny_model_dir, tmp_path, monkeypatch):
    """What it said last is on the page."""
    monkeypatch.setenv("NPROC", "three")
    assert not accept(tiny_model_dir, tmp_path, "--only", "cache")
    error = read(tmp_path, "cache").error
    assert "launch.sh" in error
    assert "ended with 2" in error
    assert "NPROC must be a positive whole number, got 'three'" in error
    assert "got &#39;three&#39;" in (tmp_path / "accept.html").read_text()


def test_a_part_without_a_check_has_not_passed():
    findings = Findings("x")
    assert not findings.passed
    findings.figure("seconds", 1.0)
    assert not findings.passed
    findings.at_most("error", float("nan"), 1.0)
    assert findings.failed == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speeed"], "there is no part speeed: they are files, velocity"),
        (["--side", "100"], "--side must be a multiple of 32, got 100"),
        (["--lightning", "/nowhere.safetensors"], "no adapter at /nowhere.safetensors"),
    ],
)
def test_wrong_options_are_a_sentence(tiny_model_dir, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        accept(tiny_model_dir, tmp_path, *words)
    assert not (tmp_path / "parts").exists()
