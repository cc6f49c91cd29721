"""Small cards: what rounded weights and offloaded blocks save and cost, what `auto` comes to, and what is suggested."""

import os
import shlex
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.commands import run_script
from tests.train.plan.planning import configure, fits, resolved, seconds
from train.model.denoiser import build_dit
from train.model.offload import offload_sizes
from train.model.quantize import quantize_blocks
from train.plan.advice import Suggestion, faster_strategy, training_advice
from train.plan.gpus import GIB, find_gpu, host_bytes

pytestmark = pytest.mark.slow

SMALL = ["RTX 4090", "RTX 3090"]
MIDDLE = ["RTX 6000 Ada", "L40S"]


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
        assert resolved(planner, gpu, *small).train.offload_blocks in range(1, 60)


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
    assert half.cpu == pytest.approx(30 * block, rel=1e-3)


def test_a_machine_without_the_memory_is_told(planner):
    config = resolved(planner, "RTX 4090")
    needed = planner.training(config, 1, find_gpu("RTX 4090")).cpu / GIB
    assert not planner.fits(config, 1, replace(find_gpu("RTX 4090"), host_gib=0.9 * needed))
    assert planner.fits(config, 1, replace(find_gpu("RTX 4090"), host_gib=1.1 * needed))
    several = replace(find_gpu("RTX 4090"), host_gib=3 * needed, per_machine=4)
    assert planner.fits(config, 2, several)
    assert not planner.fits(config, 8, several)


def test_the_memory_is_the_containers(tmp_path):
    whole = host_bytes(tmp_path)
    for name, text in (("memory.max", "max"), ("memory.max", f"{whole // 2}\n")):
        (tmp_path / name).write_text(text)
        assert host_bytes(tmp_path) == (whole if text == "max" else whole // 2)


def test_zero3_on_one_process_is_single_and_may_wait(planner):
    """As the experiments are configured: a small card is not refused for what one process does not do."""
    config = resolved(planner, "RTX 4090", "parallel=zero3")
    assert config.parallel.strategy == "single"
    assert config == resolved(planner, "RTX 4090", "parallel=single")
    assert fits(planner, "RTX 4090", "parallel=zero3")


def test_copies_of_a_step(planner):
    """Two of the waiting blocks are there already when the forward and when the backward pass begin."""

    def copied(*overrides: str) -> float:
        config = resolved(planner, "RTX 4090", "train.global_batch_size=2", *overrides)
        return planner.step(config, 1, find_gpu("RTX 4090")).copied / planner.transformer.block_bytes("bf16")

    assert copied("train.offload_blocks=0") == copied("train.offload_blocks=2") == 0
    assert copied("train.offload_blocks=10") == 2 * 2 * 8
    assert copied("train.offload_blocks=10", "loss.rollout=0.5") == pytest.approx(2 * (2 * 8 + 0.5 * 0.45 * 10))


def test_names_the_strategy_that_is_faster(planner):
    found = faster_strategy(planner, configure("parallel=zero3"), 8, find_gpu("H100"))
    assert isinstance(found, Suggestion)
    assert found.settings == "parallel=ddp"
    assert found.seconds == seconds(planner, "H100", "parallel=ddp", world_size=8)
    assert seconds(planner, "H100", "parallel=ddp", world_size=8) < seconds(
        planner, "H100", "parallel=zero3", world_size=8
    )
    assert faster_strategy(planner, configure("parallel=ddp"), 8, find_gpu("H100")) is None


@pytest.mark.parametrize(
    ("gpu", "world_size", "overrides"),
    [
        *((gpu, 1, ["optim=adamw", "train.gradient_checkpointing=off"]) for gpu in ("RTX 4090", "L40S", "A100 40GB")),
        ("H100", 1, ["train.micro_batch_size=8", "train.gradient_checkpointing=off"]),
        ("RTX 4090", 2, ["parallel=zero2"]),
        ("RTX 3090", 2, ["parallel=zero3"]),
        ("RTX 4090", 1, ["train.global_batch_size=5"]),  # which 2, 4 or 8 GPUs cannot share
    ],
)
def test_suggestions_fit_and_the_fastest_is_first(planner, gpu, world_size, overrides):
    given = [*overrides, *WITHOUT_OFFLOAD]
    found = training_advice(planner, configure(*given), world_size, find_gpu(gpu))
    assert not fits(planner, gpu, *given, world_size=world_size)
    times = [each.seconds for each in found if each.seconds]
    assert len(times) == len(found) > 1
    assert times == sorted(times)
    assert len({each.settings for each in found}) == len(found)
    same = min(each.seconds or 0.0 for each in found if not each.changes_result and each.num_gpus == world_size)
    assert all((each.seconds or 0.0) < same for each in found if each.changes_result)
    for each in found:
        assert each.changes_result == ("model.weights" in each.settings)
        kept = [override for override in given if not ("parallel=" in override and "parallel=" in each.settings)]
        command = [*kept, *shlex.split(each.settings)]
        assert fits(planner, gpu, *command, world_size=each.num_gpus), each
        assert seconds(planner, gpu, *command, world_size=each.num_gpus) == each.seconds


def test_a_smaller_adapter_is_suggested_where_nothing_else_fits(planner):
    given = ["adapter.rank=1024", "optim=adamw_cosine", "train.micro_batch_size=1"]
    found = training_advice(planner, configure(*given), 1, find_gpu("A100 40GB"))
    assert all(each.changes_result for each in found)
    assert any("adapter.rank=" in each.settings for each in found)
    for each in found:
        assert fits(planner, "A100 40GB", *given, *shlex.split(each.settings)), each


def test_a_plan_that_does_not_fit_is_exit_code_2(tmp_path):
    """And of a known model needs neither the hub nor its cache."""
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "image": "a.png", "edit_image": "a.png"}]')
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{tmp_path}/nothing"}
    given = ["+exp=lbm_2511", f"data.dataset={tmp_path}/rows.json", "phases=[plan]", "plan.gpu=4090", "parallel=single"]
    done = run_script("train/run.py", *given, "train.offload_blocks=0", check=False, env=offline)
    assert done.returncode == 2, done.stderr
    assert "1 x RTX 4090" in done.stdout
    assert "published sizes" in done.stdout
    assert "train.offload_blocks=auto" in done.stdout
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "does not fit" in error


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8", "nf4"])
def test_a_block_is_as_large_as_the_real_layers_are(planner, weights):
    """As they are quantised and laid out in memory, on the meta device."""
    with torch.device("meta"):
        dit = build_dit(planner.transformer.config | {"num_layers": 3})
    quantize_blocks(dit, weights, torch.bfloat16)
    sizes = offload_sizes(dit.transformer_blocks, 3)
    assert sizes.waiting == 3 * planner.transformer.block_bytes(weights)
    assert sizes.slots == 2 * planner.transformer.block_bytes(weights)
