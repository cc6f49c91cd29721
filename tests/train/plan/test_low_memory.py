"""Small cards: what rounded weights and offloaded blocks save and cost, what `auto` comes to, and what is suggested."""

import os
import shlex
from dataclasses import replace

import pytest
from PIL import Image

from tests.commands import run_script
from tests.train.plan.planning import MEGAPIXEL, build_optimizer, configure, published_model
from train.config import Config
from train.plan.advice import Suggestion, faster_strategy, training_advice
from train.plan.gpus import GIB, find_gpu
from train.plan.planner import Planner

SMALL = ["RTX 4090", "RTX 3090"]
MIDDLE = ["RTX 6000 Ada", "L40S"]


@pytest.fixture(scope="module")
def planner() -> Planner:
    """One for all: what it has found for a batch it keeps."""
    return Planner(configure(), published_model(), MEGAPIXEL, build_optimizer)


def resolved(planner: Planner, gpu: str, *overrides: str, world_size: int = 1) -> Config:
    return planner.without_auto(configure(*overrides), world_size, find_gpu(gpu))


def fits(planner: Planner, gpu: str, *overrides: str, world_size: int = 1) -> bool:
    return planner.fits(resolved(planner, gpu, *overrides, world_size=world_size), world_size, find_gpu(gpu))


def seconds(planner: Planner, gpu: str, *overrides: str, world_size: int = 1) -> float:
    taken = planner.seconds(resolved(planner, gpu, *overrides, world_size=world_size), world_size, find_gpu(gpu))
    assert taken is not None
    return taken


WITHOUT_OFFLOAD = ["train.offload_blocks=0"]


@pytest.mark.parametrize("gpu", MIDDLE)
@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize("optim", ["prodigy", "adamw"])
def test_8_bits_fit_48_gb(planner, gpu, weights, optim):
    assert fits(planner, gpu, f"model.weights={weights}", f"optim={optim}", *WITHOUT_OFFLOAD)
    assert not fits(planner, gpu, f"optim={optim}", *WITHOUT_OFFLOAD)


@pytest.mark.parametrize("gpu", SMALL)
@pytest.mark.parametrize("optim", ["prodigy", "adamw8bit"])
def test_4_bits_fit_24_gb(planner, gpu, optim):
    assert fits(planner, gpu, "model.weights=nf4", f"optim={optim}", *WITHOUT_OFFLOAD)


@pytest.mark.parametrize("gpu", SMALL)
@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("optim", ["prodigy", "adamw", "adamw8bit"])
def test_24_gb_cost_less_than_half_the_speed(planner, gpu, weights, optim):
    """Beside bf16 on the same card if it had all the memory that it wanted: at most 1.5 times as long."""
    whole = seconds(planner, gpu, "train.gradient_checkpointing=off", *WITHOUT_OFFLOAD, f"optim={optim}")
    small = [f"model.weights={weights}", f"optim={optim}"]
    assert fits(planner, gpu, *small)
    assert seconds(planner, gpu, *small) <= 1.5 * whole
    if weights == "int8":
        assert 0 < resolved(planner, gpu, *small).train.offload_blocks < 60


def test_recomputes_before_it_offloads_and_offloads_as_little_as_fits(planner):
    assert resolved(planner, "H100").train.offload_blocks == 0
    chosen = resolved(planner, "L40S").train
    assert (chosen.gradient_checkpointing, fits(planner, "L40S")) == ("full", True)
    assert isinstance(chosen.offload_blocks, int)
    assert fits(planner, "L40S", f"train.offload_blocks={chosen.offload_blocks}")
    assert not fits(planner, "L40S", f"train.offload_blocks={chosen.offload_blocks - 1}")
    selective = resolved(planner, "RTX 4090", "train.gradient_checkpointing=selective").train
    assert (selective.gradient_checkpointing, selective.offload_blocks) == ("selective", 60)  # the least that there is
    assert resolved(planner, "L40S", "train.offload_blocks=60").train.gradient_checkpointing != "full"
    assert resolved(planner, "L40S", "train.device=cpu").train.offload_blocks == 0
    assert resolved(planner, "RTX 4090", "parallel=zero3", world_size=2).train.offload_blocks == 0


def test_offloaded_blocks_leave_the_gpu_but_for_two(planner):
    def memory(*overrides: str):
        return planner.training(
            resolved(planner, "H100", "train.gradient_checkpointing=full", *overrides), 1, find_gpu("H100")
        )

    kept, half, most = memory(*WITHOUT_OFFLOAD), memory("train.offload_blocks=30"), memory("train.offload_blocks=60")
    block = 2 * (
        8 * 3072**2 + 4 * 3072 * 12288 + 2 * 3072 * 18432
    )  # attention, feed-forward, modulation, without biases
    assert kept.total - half.total == pytest.approx(28 * block, rel=1e-3)
    assert half.total - most.total == pytest.approx(30 * block, rel=1e-3)
    assert (kept.cpu, most.cpu) == (0, 2 * half.cpu)
    assert half.cpu >= 30 * block


def test_a_machine_without_the_memory_is_told(planner):
    config = resolved(planner, "RTX 4090")
    needed = planner.training(config, 1, find_gpu("RTX 4090")).cpu / GIB
    assert not planner.fits(config, 1, replace(find_gpu("RTX 4090"), host_gib=0.9 * needed))
    assert planner.fits(config, 1, replace(find_gpu("RTX 4090"), host_gib=1.1 * needed))
    several = replace(find_gpu("RTX 4090"), host_gib=3 * needed, per_machine=4)
    assert planner.fits(config, 2, several)
    assert not planner.fits(config, 8, several)


@pytest.mark.parametrize(
    ("gpu", "world_size", "overrides", "strategy"),
    [
        ("RTX 4090", 1, [], "single"),
        ("H100", 8, [], "ddp"),
        ("RTX 4090", 8, [], "zero3"),
        ("RTX 4090", 8, ["model.weights=int8"], "ddp"),
        ("RTX 4090", 8, ["train.offload_blocks=50"], "ddp"),
        ("L40S", 2, ["adapter.dora=true"], "ddp"),
    ],
)
def test_chooses_a_strategy(planner, gpu, world_size, overrides, strategy):
    assert planner.strategy(configure(*overrides), world_size, find_gpu(gpu)) == strategy


def test_names_the_strategy_that_is_faster(planner):
    found = faster_strategy(planner, configure("parallel=zero3"), 8, find_gpu("H100"))
    assert isinstance(found, Suggestion)
    assert found.settings == "parallel=ddp"
    assert found.seconds == seconds(planner, "H100", "parallel=ddp", world_size=8)
    assert found.seconds < seconds(planner, "H100", "parallel=zero3", world_size=8)
    assert faster_strategy(planner, configure("parallel=ddp"), 8, find_gpu("H100")) is None


@pytest.mark.parametrize("gpu", ["RTX 4090", "L40S", "A100 40GB"])
def test_suggestions_fit_and_the_fastest_is_first(planner, gpu):
    config = configure("optim=adamw", "train.offload_blocks=0", "train.gradient_checkpointing=off")
    found = training_advice(planner, config, 1, find_gpu(gpu))
    times = [each.seconds for each in found if each.seconds]
    assert len(times) == len(found) > 2
    assert times == sorted(times)
    same = [each.seconds for each in found if not each.changes_result and each.num_gpus == 1]
    assert all(each.seconds < min(same) for each in found if each.changes_result)
    for each in found:
        assert each.changes_result == ("model.weights" in each.settings)
        given = [
            "optim=adamw",
            "train.offload_blocks=0",
            "train.gradient_checkpointing=off",
            *shlex.split(each.settings),
        ]
        assert fits(planner, gpu, *given, world_size=each.num_gpus), each
        assert seconds(planner, gpu, *given, world_size=each.num_gpus) == each.seconds


def test_a_plan_that_does_not_fit_is_exit_code_2(tmp_path):
    """And of a known model needs neither the hub nor its cache."""
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "image": "a.png", "edit_image": "a.png"}]')
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = [
        "+exp=lbm_2511",
        f"data.dataset={tmp_path}/rows.json",
        f"run_dir={tmp_path}/run",
        "phases=[plan]",
        "plan.gpu=4090",
    ]
    offline = {"env": os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing")}}
    done = run_script("train/run.py", *given, "parallel=single", "train.offload_blocks=0", check=False, **offline)
    assert done.returncode == 2, done.stderr
    assert "1 x RTX 4090" in done.stdout
    assert "published sizes" in done.stdout
    assert "train.offload_blocks=auto" in done.stdout
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "does not fit" in error
    done = run_script("train/run.py", *given, "parallel=single", **offline)
    assert "it fits" in done.stdout
    assert "global batch 16 = 1 sample x 16 accumulated x 1 GPU" in done.stdout
