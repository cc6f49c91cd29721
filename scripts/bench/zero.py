"""Measures a training step with each strategy: its time, and the communication between the ranks.

    accelerate launch scripts/bench/zero.py --json zero.json
    accelerate launch --multi_gpu --num_processes 2 scripts/bench/zero.py --tiny

The strategies are `single` and `zero3` on one process, and `ddp`, `zero2` and `zero3` on several; `ratio` is the time compared
with the first of them. It uses random weights of the real size on random data, AdamW and full gradient checkpointing. A step is
that of the training loop, on one micro-batch or on `--accumulate`. The seconds are the median of 5 steps after 2 that are not
counted. For one more step, the collectives are counted: in total, per block and micro-batch, and the MB that each rank receives,
compared with the plan. `--tiny` uses the tiny model's sizes, with ZeRO's sizes to match. Without a GPU, the ranks use gloo.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data_prep.cache.sizes import DatasetSizes, RowSize
from data_prep.errors import InputError, exit_codes
from data_prep.model.geometry import Size
from losses.flow_matching import FlowMatchingLoss
from losses.randomness import SampleRandom
from scripts.bench.collectives import Collectives
from scripts.bench.report import Report, environment
from scripts.bench.trainers import make_batch
from scripts.gpu_smoke import SIZES, RandomModel, free, write_model
from train.builders import build, build_model
from train.config import Config, compose
from train.parallel.processes import Processes
from train.plan.gpus import find_gpu
from train.plan.planner import Planner

STRATEGIES = {1: ("single", "zero3"), 2: ("ddp", "zero2", "zero3")}
"""For one process, and for several."""
COLUMNS = {
    "strategy": -10,
    "s/step": 9,
    "ratio": 8,
    "collectives": 13,
    "a block": 9,
    "MB": 11,
    "planned MB": 12,
    "loss": 10,
}
WARM_UP, TIMED = 2, 5
TEXT = 250
RELEASED = {"param_persistence_threshold": 0, "max_live_parameters": 30_000, "max_reuse_distance": 30_000}
"""Settings of `--tiny`: sizes at which ZeRO-3 treats small weights like those of 20 B. By default it would keep them all."""


def configure(strategy: str, folder: Path, options: argparse.Namespace) -> Config:
    """The run of a strategy."""
    released = {**RELEASED, "prefetch_bucket_size": 20_000} if options.tiny else {}
    return compose(
        [
            *("+exp=sft_2511", "adapter=lora", "optim=adamw", *SIZES["tiny" if options.tiny else "full"]),
            *(f"model.path={folder}/model", "data.dataset=none", f"parallel={strategy}"),
            *(
                f"train.grad_accum_steps={options.accumulate}",
                "train.offload_blocks=0",
                "train.gradient_checkpointing=full",
            ),
            *(f"+parallel.zero_options.stage3_{name}={value}" for name, value in released.items()),
        ]
    )


def planned_bytes(config: Config, model: RandomModel, world_size: int, side: int) -> int:
    """What each rank receives in a step, as the plan says."""
    sizes = DatasetSizes((RowSize(Size(side, side), (Size(side, side),), TEXT),), 1, "a bench")

    def build_optimizer(node: dict[str, Any], parameters: list[Any]) -> Any:
        return build(node, "optim", parameters, num_steps=1)

    planner, gpu = Planner(config, model, sizes, build_optimizer), find_gpu()
    step = planner.step(planner.without_auto(config, world_size, gpu), world_size, gpu)
    return step.gathered + step.reduced


def received(counted: Collectives, world_size: int) -> float:
    """The bytes that a ring brings each rank: (n - 1) / n of what is gathered, and twice as much of what is added up on all.

    As in Thakur, Rabenseifner & Gropp 2005, Optimization of Collective Communication Operations in MPICH.
    """
    sums = sum(number for kind, number in counted.bytes.items() if kind.startswith("allreduce"))
    return (counted.bytes.total() + sums) * (world_size - 1) / world_size


def measure(config: Config, model: RandomModel, processes: Processes, side: int) -> dict[str, float]:
    """A row."""
    adapter, parallel = build_model(config, model, processes)
    optimizer = build(config.optim, "optim", adapter.parameters(), num_steps=WARM_UP + TIMED + 1)
    batch = make_batch([TEXT], side, model.config("transformer")["joint_attention_dim"]).to(processes.device)
    loss, accumulated = FlowMatchingLoss(), config.train.accumulation(processes.world_size)

    def step(number: int) -> float:
        for micro in range(accumulated):
            samples = [(number * accumulated + micro) * processes.world_size + processes.rank]
            value = loss(parallel.denoiser, batch, SampleRandom(0, samples)).loss.mean()
            parallel.backward(value, last=micro == accumulated - 1)
        optimizer.clip_gradients()
        parallel.step(optimizer, number)
        return value.item()

    seconds = []
    for number in range(WARM_UP + TIMED):
        processes.barrier()
        start = time.perf_counter()
        value = step(number)  # asks for the loss, so the GPU has done its part
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    with Collectives() as counted:
        step(WARM_UP + TIMED)
    blocks = model.config("transformer")["num_layers"] * accumulated
    return {
        "s/step": statistics.median(seconds[WARM_UP:]),
        "collectives": counted.calls.total(),
        "a block": counted.calls.total() / blocks,
        "MB": received(counted, processes.world_size) / 1e6,
        "loss": value,
        **{f"calls of {kind}": number for kind, number in counted.calls.items()},
    }


def main(options: argparse.Namespace) -> None:
    """A row for each strategy."""
    size = "tiny" if options.tiny else "full"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = Processes.start("cpu" if options.tiny else None)
        write_model(folder / "model", size, options.layers)
        model, report, first = RandomModel(folder / "model", processes.device), None, None
        if processes.is_main:
            header = environment(processes.device.type) | {"processes": processes.world_size}
            report = Report(COLUMNS, options.json, header)
        for strategy in STRATEGIES[min(2, processes.world_size)]:
            config = configure(strategy, folder, options)
            torch.manual_seed(0)  # of the weights, which each rank draws for itself
            row = measure(config, model, processes, options.side)
            first = first or row["s/step"]
            row |= {"ratio": row["s/step"] / first}
            row |= {"planned MB": planned_bytes(config, model, processes.world_size, options.side) / 1e6}
            if report:
                report.add(strategy, row)
            free()
        processes.stop()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, help="Side of the images in pixels (default 1024, with --tiny 64).")
    parser.add_argument("--layers", type=int, help="Number of the transformer's blocks (default all).")
    parser.add_argument("--accumulate", type=int, default=1, help="Micro-batches per step (default 1).")
    parser.add_argument("--tiny", action="store_true", help="Use the tiny model on the CPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to, after every row.")
    options = parser.parse_args()
    options.side = options.side or (64 if options.tiny else 1024)
    if options.accumulate < 1 or options.side % 32:
        raise InputError(
            f"--accumulate is at least 1 and --side a multiple of 32, got {options.accumulate}, {options.side}"
        )
    return options


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
