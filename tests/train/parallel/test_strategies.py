"""Training on several processes and under ZeRO equals training on one, is resumed exactly, and fails in words."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.children import PATIENCE, started, wait_until
from tests.commands import launch, launcher, run_script
from tests.train.test_run import adapter_bytes, metrics

pytestmark = pytest.mark.timeout(1800)  # its fixture trains many times on two processes each

OPTIMS = {"adamw": ["optim=adamw", "optim.lr=3e-4"], "prodigy": ["optim=prodigy", "+optim.d0=1e-4"]}
NUM_STEPS = 12
GROUPS = ["train.group_size=8", "loss.rollout=0.5"]
"""Every other group has 4 of the 12 rows, so that a step is 4 samples or 8; and some ranks need a first forward, others not."""
CASES = [
    (1, "zero2", "prodigy", (2, 4)),
    (1, "zero3", "prodigy", (8, 1)),  # nothing to share out: as single
    *((2, "ddp", "adamw", (1, 4)), (2, "ddp", "prodigy", (4, 1))),
    *((2, "zero2", "adamw", (4, 1)), (2, "zero2", "prodigy", (1, 4))),
    *((2, "zero3", "adamw", (4, 1)), (2, "zero3", "prodigy", (1, 4))),
]
"""Processes, strategy, optimizer, and the micro-batch and accumulation that make a global batch of 8."""
REFERENCES = sorted({(optim, cut) for n, _, optim, (size, steps) in CASES for cut in ((1, 8), (size, steps * n))})
"""What one process trains for them: in micro-batches of one, and in the same micro-batches."""
VARIANTS = {
    "released": ["train.gradient_checkpointing=full"],
    "sum": ["loss=lbm", "loss.combine=sum", "train.gradient_checkpointing=full"],
    "compiled": ["train.gradient_checkpointing=full", "train.compile=on"],
    "bf16": ["model.dtype=bfloat16"],
    "lokr": ["adapter=lokr", "adapter.decompose_factor=4", "loss.preserve=0.5"],
    "validated": [*OPTIMS["prodigy"], "validate=tiny_lbm", "validate.num_rows=3", "train.validate_every=2"],
    "unvalidated": [*OPTIMS["prodigy"]],
    "extra": [
        "adapter=ste",
        "adapter.modules.ste.hidden=16",
        "adapter.train_modules=[norm_out,proj_out,img_mod,norm_q]",
    ],
}

WHOLE = ("ddp", "zero2")
"""Strategies under which each rank has all frozen weights."""
FROZEN = {
    "single-int8-frozen": (1, "single", "int8", 0),
    "ddp-int8": (2, "ddp", "int8", 1),
    "zero2-int8": (2, "zero2", "int8", 2),
    "single-fp8-frozen": (1, "single", "fp8", 0),
    "zero2-fp8": (2, "zero2", "fp8", 0),
    "single-bf16-frozen": (1, "single", "bf16", 0),
    "ddp-bf16": (2, "ddp", "bf16", 2),
}
"""Run -> processes, strategy, `model.weights`, and blocks of the two that wait in CPU memory."""

SIZES = {"param_persistence_threshold": 0, "max_live_parameters": 30_000, "max_reuse_distance": 30_000}
RELEASED = [
    *(f"+parallel.zero_options.stage3_{name}={value}" for name, value in SIZES.items()),
    *("+parallel.zero_options.stage3_prefetch_bucket_size=20000", "parallel.bucket_size=5000"),
]
"""Sizes at which ZeRO-3 treats the tiny model's weights as it does those of 20 B: by default it would keep all of them."""


@pytest.fixture(scope="module")
def shallow_model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with two blocks: as much to shard, sooner done. Its encoders are the same, and so is the cache."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 2}))
    (weights,) = (folder / "transformer").glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith(DROPPED)}
    save_file(kept, weights)
    return folder


DROPPED = tuple(f"transformer_blocks.{i}." for i in range(2, 5))


@pytest.fixture(scope="module")
def settings(shallow_model_dir, tiny_pairs, tiny_cache) -> list[str]:
    """What all runs here share."""
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    paths = [f"model.path={shallow_model_dir}", f"cache.dir={tiny_cache}"]
    return ["+exp=tiny_lbm", *data, *paths, "adapter.rank=4", "train.save_every=100", "validate=none"]


def cut_settings(cut: tuple[int, int]) -> list[str]:
    return [f"train.micro_batch_size={cut[0]}", f"train.grad_accum_steps={cut[1]}"]


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory) -> Path:
    """All runs of `CASES` and `VARIANTS`, each in a folder of its own, from one launch per number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: dict[int, list[list[str]]] = {1: [], 2: []}

    def add(num_processes: int, name: str, num_steps: int, *overrides: str) -> None:
        job = [*settings, f"run_dir={folder}/{name}", f"train.num_steps={num_steps}", *overrides]
        jobs[num_processes].append(job)

    for optim, cut in REFERENCES:
        add(1, run_name(1, "single", optim, cut), NUM_STEPS, *GROUPS, *OPTIMS[optim], *cut_settings(cut))
    for num_processes, strategy, optim, cut in CASES:
        name = run_name(num_processes, strategy, optim, cut)
        add(num_processes, name, NUM_STEPS, *GROUPS, *OPTIMS[optim], *cut_settings(cut), f"parallel={strategy}")
    for name, overrides in VARIANTS.items():
        overrides = ["train.group_size=2", *overrides]
        if name not in ("compiled", "unvalidated"):  # compared with "released", and with each other's validated run
            add(1, f"single-{name}", 6, *overrides, *cut_settings((2, 1)))
        for strategy in ("zero3", "zero3_offload", *(WHOLE if name in ("lokr", "extra") else ())):
            released = RELEASED if name in ("released", "extra") or strategy == "zero3_offload" else []
            add(2, f"{strategy}-{name}", 6, *overrides, *released, *cut_settings((1, 1)), f"parallel={strategy}")
    for name, (num_processes, strategy, weights, waiting) in FROZEN.items():
        overrides = [f"parallel={strategy}", f"model.weights={weights}", f"train.offload_blocks={waiting}"]
        cut = [*cut_settings((2 // num_processes, 1)), "train.group_size=2"]
        add(num_processes, name, 6, *overrides, *OPTIMS["adamw"], *cut)
    for num_processes, listed in jobs.items():
        (folder / "jobs.json").write_text(json.dumps(listed))
        launch(num_processes, "tests/train_many.py", folder / "jobs.json")
    return folder


def run_name(num_processes: int, strategy: str, optim: str, cut: tuple[int, int]) -> str:
    return f"{num_processes}-{strategy}-{optim}-{cut[0]}x{cut[1]}"


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


def adapter(run_dir: Path, step: int) -> torch.Tensor:
    """The exported weights as one vector, with those that were trained beside LoRA."""
    files = (run_dir / "checkpoints" / f"step-{step:06d}").glob("*_mod*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def assert_same_training(run: Path, reference: Path, step: int, rel: float) -> None:
    """Losses within `rel`, and the exported adapter within 1e-4 in relative L2."""
    assert losses(run) == pytest.approx(losses(reference), rel=rel)
    ours, theirs = adapter(run, step), adapter(reference, step)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: run_name(*case))
def test_every_way_to_split_the_work_trains_the_same(runs, case):
    """Float32 sums in another order differ in the last of 24 bits (6e-8); twelve steps leave a few of them."""
    num_processes, _, optim, cut = case
    run = runs / run_name(*case)
    assert_same_training(run, runs / run_name(1, "single", optim, (1, 8)), NUM_STEPS, rel=1e-5)
    same_micro_batches = (cut[0], cut[1] * num_processes)
    assert_same_training(run, runs / run_name(1, "single", optim, same_micro_batches), NUM_STEPS, rel=1e-6)
    start, end = losses(run)[0], min(losses(run)[-5:])
    assert abs(end - start) > 0.01 * start  # the weights do move
    if optim == "prodigy":
        d = [line["d"] for line in metrics(run)]
        assert d[-1] > 5 * d[0]
        assert d == pytest.approx(
            [line["d"] for line in metrics(runs / run_name(1, "single", optim, (1, 8)))], rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
class TestVariants:
    """On two ranks, against one process."""

    def test_two_streams_and_recomputed_activations(self, runs, strategy):
        assert_same_training(runs / f"{strategy}-sum", runs / "single-sum", 6, rel=1e-6)
        assert "loss/latent/sub" in metrics(runs / f"{strategy}-sum")[0]

    def test_weights_that_are_released_and_gathered_again(self, runs, strategy):
        assert_same_training(runs / f"{strategy}-released", runs / "single-released", 6, rel=1e-6)

    def test_compiled_blocks(self, runs, strategy):
        """As the same blocks run one operation after the other."""
        assert_same_training(runs / f"{strategy}-compiled", runs / "single-released", 6, rel=1e-6)

    def test_bf16_within_its_rounding(self, runs, strategy):
        """8 bits: 0.4 % a value. The batch of a forward pass differs, and with it the order of sums."""
        assert losses(runs / f"{strategy}-bf16") == pytest.approx(losses(runs / "single-bf16"), rel=0.02)

    def test_validation_leaves_training_unchanged(self, runs, strategy):
        """Bit for bit: the averaged weights were in the model for a while, and went again."""
        trained = [line for line in metrics(runs / f"{strategy}-validated") if "loss" in line]
        assert trained == metrics(runs / f"{strategy}-unvalidated")
        assert adapter_bytes(runs / f"{strategy}-validated", 6) == adapter_bytes(runs / f"{strategy}-unvalidated", 6)

    def test_validation_is_shared_out_and_complete(self, runs, strategy):
        """Three rows on two ranks: each once, with the scores of one process (8-bit pixels may round otherwise)."""
        for step in (2, 4, 6):
            ours, theirs = (
                json.loads(
                    (runs / f"{name}-validated" / "validation" / f"step-{step:06d}" / "metrics.json").read_text()
                )
                for name in (strategy, "single")
            )
            assert [row["id"] for row in ours["per_row"]] == [row["id"] for row in theirs["per_row"]]
            assert ours["num_rows"] == 3
            for method in ("source", *(name for name in theirs if name.startswith("steps_"))):
                assert ours[method] == pytest.approx(theirs[method], rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload", "zero2", "ddp"])
def test_what_is_trained_beside_lora_is_the_same_on_two_ranks(runs, strategy):
    """Modules in full, around the blocks and in them, and an added one, which begins at zero: all of it has moved alike."""
    run, reference = runs / f"{strategy}-extra", runs / "single-extra"
    assert_same_training(run, reference, 6, rel=1e-6)
    moved = []
    for each in run, reference:
        tensors = load_file(each / "checkpoints" / "step-000006" / "extra_modules.safetensors")
        assert {"norm_out.linear.bias", "transformer_blocks.1.attn.norm_q.weight"} <= tensors.keys()
        moved.append(tensors["modules.ste.leave.weight"].double())
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[1].norm()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload", *WHOLE])
def test_lokr_and_a_teaching_base_model(runs, strategy):
    """Some ranks ask the base model, others do not need it; one process asks it for two samples at once."""
    assert_same_training(runs / f"{strategy}-lokr", runs / "single-lokr", 6, rel=1e-6)
    taught = [line["loss/preserve"] for line in metrics(runs / "single-lokr") if "loss/preserve" in line]
    assert len(taught) > 3
    assert max(taught) > 1e-6  # at first the adapter is nothing


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("run", [name for name, (num_processes, *_) in FROZEN.items() if num_processes == 2])
def test_quantised_and_waiting_weights_train_the_same_on_two_ranks(runs, run):
    """As `test_every_way_to_split_the_work_trains_the_same`, after fewer steps."""
    weights = FROZEN[run][2]
    assert_same_training(runs / run, runs / f"single-{weights}-frozen", 6, rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_the_job_and_the_same_command_continues_exactly(settings, tmp_path):
    """Bit for bit, at the same number of processes; at another, within rounding, from the same files."""
    seed = random.SystemRandom().randrange(1000)
    kill_at = random.Random(seed).randrange(4, 10)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [*OPTIMS["prodigy"], "train.num_steps=14", "train.save_every=3", "train.keep_last=9", "parallel=zero3"]

    def command(run_dir: Path) -> list[str]:
        return ["train/run.py", *settings, *options, *cut_settings((1, 2)), f"run_dir={run_dir}"]

    launch(2, *command(whole))
    with started([sys.executable, *launcher(2), *command(broken)], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: (broken / "metrics.jsonl").exists() and len(metrics(broken)) >= kill_at, process)
        (second,) = (child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
        second.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) != 0  # rank 0 does not hang
    assert len(metrics(broken)) < 14
    shutil.copytree(broken, tmp_path / "other")

    done = launch(2, *command(broken))
    assert done.stderr.count("resuming from") == 1
    assert metrics(broken) == metrics(whole), f"seed {seed}"
    assert adapter_bytes(broken, 14) == adapter_bytes(whole, 14), f"seed {seed}"
    files = {path.name for path in (broken / "checkpoints" / "step-000014").iterdir()}

    alone = [*settings, *options, "parallel=single", *cut_settings((1, 4)), f"run_dir={tmp_path}/other"]
    assert "resuming from" in run_script("train/run.py", *alone).stderr
    assert_same_training(tmp_path / "other", whole, 14, rel=1e-5)
    assert {path.name for path in (tmp_path / "other" / "checkpoints" / "step-000014").iterdir()} == files

    half = launch(2, "train/run.py", *settings, *options, *cut_settings((1, 1)), f"run_dir={broken}", check=False)
    assert "the global batch was 4 and is 2" in half.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_fails_ends_the_job_with_its_own_message(settings, tmp_path):
    """Rank 0 waits for a gradient that will never come; the launcher ends it."""
    loss = ["loss=flow", "loss._target_=tests.failing.FailsOnRank", "+loss.rank=1", "+loss.step=3"]
    options = [*loss, "parallel=zero3", "train.num_steps=20", f"run_dir={tmp_path}"]
    done = launch(2, "train/run.py", *settings, *options, check=False)
    assert done.returncode != 0
    assert "rank 1 failed: ArithmeticError: this rank fails at step 3" in done.stderr
    assert len(metrics(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_that_all_ranks_see_is_said_once(settings, tmp_path):
    done = launch(2, "train/run.py", *settings, "parallel=single", f"run_dir={tmp_path}", check=False)
    assert done.stderr.count("error: ") == 1
    assert "rank 0: error: parallel=single trains on one process, but 2 were launched" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_no_rank_holds_more_than_its_part(shallow_model_dir):
    """Under ZeRO-3 a weight is cut as soon as rank 0 has read it."""
    done = launch(2, "tests/load_shards.py", shallow_model_dir)
    everyone = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert everyone == [{"whole": 0, "largest_part": 0.5, "equal": True}] * 2


@pytest.mark.slow
@pytest.mark.distributed
def test_zero3_sends_whole_blocks(settings, shallow_model_dir, tmp_path):
    """The calls of a step follow the number of blocks, not of their layers, and each weight is sent once for the forward and
    once for the backward pass. Two runs that differ by two steps tell what a step sends once DeepSpeed knows the blocks."""
    micro_batches, steps = 2, (3, 5)
    common = [*settings, *RELEASED, *cut_settings((1, micro_batches)), "parallel=zero3", "data.validation=null"]
    jobs = [[*common, f"train.num_steps={n}", f"run_dir={tmp_path}/{n}"] for n in steps]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch(2, "tests/count_collectives.py", tmp_path / "jobs.json")
    few, more = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    calls, sent = (
        {name: (more[what][name] - few[what][name]) / 2 for name in more[what]} for what in ("calls", "bytes")
    )

    (file,) = (shallow_model_dir / "transformer").glob("*.safetensors")
    blocks = {name: weight for name, weight in load_file(file).items() if name.startswith("transformer_blocks.")}
    num_blocks = len({name.split(".")[1] for name in blocks})
    assert sum(calls.values()) <= 4 * num_blocks * micro_batches + 10
    gathered = 2 * micro_batches * 4 * sum(weight.numel() for weight in blocks.values())
    assert gathered <= sent["_allgather_base_"] < 1.01 * gathered  # what a step logs is sent too
    run = tmp_path / "5" / "checkpoints" / "step-000005" / "training_lora.safetensors"
    lora = sum(weight.nbytes for weight in load_file(run).values())
    asked = micro_batches + 1  # whether to stop, before each micro-batch, and whether to save: 4 bytes each
    assert (calls["allreduce_"], sent["allreduce_"]) == (1 + asked, lora + 4 * asked)
    assert calls["broadcast_"] == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerates_own_deepspeed_settings_are_honoured(settings, tmp_path):
    """ZeRO-2 from the command line of accelerate, with the bucket size of a DeepSpeed file."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 12345}}))
    options = ("--use_deepspeed", "--deepspeed_config_file", str(file))
    arguments = ["train/run.py", *settings, "train.num_steps=2"]
    done = launch(2, *arguments, "parallel=zero2", f"run_dir={tmp_path}/run", options=options)
    assert len(metrics(tmp_path / "run")) == 2, done.stderr
    wrong = launch(2, *arguments, "parallel=zero3", f"run_dir={tmp_path}/wrong", options=options, check=False)
    assert "accelerate was launched with DeepSpeed's ZeRO stage 2, but parallel=zero3" in wrong.stderr
