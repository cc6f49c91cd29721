"""Prints what each rank holds of a transformer that was loaded for ZeRO-3, as JSON. The argument is the model's folder."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from data_prep.model.directory import ModelDirectory
from train.model.denoiser import load_denoiser
from train.parallel.processes import Processes
from train.parallel.settings import zero_settings
from train.parallel.strategies import shard

if __name__ == "__main__":
    processes = Processes.start("cpu")
    cut = shard(zero_settings(3, False, 1000, True, True, {}, 1, 1), processes)
    whole = 0

    def watched(owner: torch.nn.Module, name: str) -> None:
        global whole
        cut(owner, name)
        whole += owner.get_parameter(name).numel()

    model = ModelDirectory.resolve(sys.argv[1])
    denoiser = load_denoiser(model, dtype=torch.float32, place=watched, read=processes.is_main)
    parts = [(p.ds_tensor.numel(), p.ds_numel) for p in denoiser.parameters()]
    equal = True
    for p, expected in zip(denoiser.parameters(), load_denoiser(model, dtype=torch.float32).parameters(), strict=True):
        own = expected.flatten()[processes.rank * p.ds_tensor.numel() :][: p.ds_tensor.numel()]
        equal &= torch.equal(p.ds_tensor[: len(own)], own)
    largest = max(part / total for part, total in parts if total % processes.world_size == 0)
    everyone = processes.gather({"whole": whole, "largest_part": largest, "equal": equal})
    if processes.is_main:
        print(json.dumps(everyone), flush=True)
    processes.stop()
