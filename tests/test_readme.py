"""Every command of the README runs, as it stands there, in a folder like the one that it describes."""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from scripts import photographs
from tests.children import PATIENCE, run, started, wait_until
from tests.commands import ROOT, warm_programs

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
QUICK = (
    "adapter.rank=4 train.num_steps=1 train.grad_accum_steps=1 train.global_batch_size=null "
    "train.micro_batch_size=1 data.max_pixels=4096 data.vision_pixels=12544"
)
FULL_SIZE = "model.path=models/tiny model.dtype=float32 model.zero_cond_t=null logger=none validate.num_rows=1"


@pytest.fixture(scope="module")
def workspace(tiny_model_dir, tiny_pairs, tmp_path_factory) -> Path:
    """`pairs.json`, `photos/`, `jobs.csv` and `models/tiny`, as the README's reader has them."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(tiny_model_dir)
    shutil.copytree(tiny_pairs, folder / "photos")
    rows = json.loads((tiny_pairs / "train.json").read_text()) + [
        row | {"split": "validation"} for row in json.loads((tiny_pairs / "validation.json").read_text())[:2]
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "photographs").mkdir()
    for photograph in photographs.TRAIN[-4:]:
        photographs.load(photograph).resize((160, 128)).save(folder / "photographs" / f"{photograph.stem}.png")
    (folder / "photos" / "before").mkdir()
    shutil.copy(tiny_pairs / rows[0]["edit_image"], folder / "photos" / "before" / "01.png")
    (folder / "jobs.csv").write_text("image,prompt\nphotos/before/01.png,Remove the sticker.\n")
    return folder


def quick(command: str) -> str:
    """The command at reduced length and size, with the tiny model in the real one's place."""
    command = command.removeprefix("pip install uv && uv run ")  # this is that environment
    command = re.sub(r"\b(train|eval|data_prep|scripts)/(\w+\.(py|sh))", rf"{ROOT}/\1/\2", command)
    if command == "pytest":
        return f"cd {ROOT} && pytest --collect-only -q tests/train/test_config.py"  # this very run is the rest
    if "make_tiny_model" in command:
        return f"{command} --out made/tiny"
    if "demo.sh" in command:
        return f"DEMO_DIR=$PWD/demo DEMO_MODEL=$PWD/models/tiny DEMO_STEPS=2 DEMO_CROPS=4 DEMO_HELD_OUT=1 {command}"
    if ("train/run.py" in command or "scripts/train_" in command) and "--cfg" not in command:
        small = f"{QUICK} {FULL_SIZE}" if "2511" in command else QUICK
        if " -m " in command:  # which sweeps over the rank
            small = small.replace("adapter.rank=4 ", "")
        return f"{command} {small} train.save_every=1"
    return command.replace("step-001000", "step-000001")


def serve(command: str, workspace: Path, environment: dict[str, str]) -> None:
    """Starts the page, which ends when it is interrupted, and asks it for itself."""
    shown = []

    def answers() -> bool:
        with suppress(OSError):
            shown.append(urllib.request.urlopen("http://127.0.0.1:7999", timeout=30).read())
        return bool(shown)

    where = {"cwd": workspace, "env": environment, "stdin": subprocess.DEVNULL}
    with started(["bash", "-c", f"exec {command}"], **where) as server:
        wait_until(answers, server)
        assert b"Edit pictures by instruction" in shown[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0


@pytest.mark.slow
def test_every_command_of_the_readme(workspace, tmp_path):
    """In order: the later ones use what the earlier ones made."""
    environment = os.environ | warm_programs(tmp_path / "programs") | {"WANDB_MODE": "offline"}
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        if "eval/app.py" in command:
            serve(quick(command), workspace, environment)
            continue
        done = run(["bash", "-c", quick(command)], cwd=workspace, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    report = (workspace / "demo" / "report.html").read_text()
    assert "LBM" in report or "Latent Bridge Matching" in report
    assert report.count("data:image/png;base64,") >= 2
    metrics = json.loads((workspace / "demo/lbm/validation/step-000002/metrics.json").read_text())
    assert {"num_rows", "source", "steps_1", "steps_2", "steps_4", "per_row"} <= metrics.keys()
    assert {"psnr", "ssim", "psnr_edited", "psnr_background"} <= metrics["source"].keys()
    assert (workspace / "result.png").stat().st_size > 1000
    assert (workspace / "runs/scores/report.html").exists()


def test_the_readme_names_every_room_and_every_file_outside_them():
    """The file tree does not drift."""
    tree = README[README.index("## Files") :]
    for folder in ("losses", "data_prep", "train", "eval"):
        for file in (ROOT / folder).glob("*.py"):
            known = {"__init__.py", "errors.py", "terms.py"}
            assert file.name in known or file.name in tree, file
        for room in (ROOT / folder).glob("*/__init__.py"):
            assert f"  {room.parent.name}/" in tree, room
