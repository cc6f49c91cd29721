"""A few steps of training, and a cache, on each device against the CPU's."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file

from data_prep.model.directory import ModelDirectory
from scripts.gpu_smoke import free
from tests.caching import cached
from tests.gpu.tier import on_devices
from train.config import compose
from train.model import execution
from train.parallel.processes import Processes
from train.phases import cache_phase, plan_run, train_phase
from train.plan.planner import geometry_of

pytestmark = [
    # PyTorch's tracer looks at `.grad` of tensors that have none, and warns of itself.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # What DeepSpeed and the real compiler warn of is theirs.
    pytest.mark.filterwarnings("ignore::Warning:deepspeed"),
    pytest.mark.filterwarnings("ignore::Warning:torch._inductor"),
]

STEPS = 3
ORDER = 1e-5
"""Float32 sums in another order differ in the last of 24 bits (6e-8), and after three steps by a few of them: two ranks against
one, which is another order too, are within 1e-6 (tests/train/parallel/test_strategies.py)."""
BF16 = 0.02
"""8 bits are 0.4 % a value; the bound of the same tests."""
ROUNDED = {"int8": 0.02, "fp8": 0.06, "nf4": 0.18}
"""What these formats may change in a velocity (tests/eval/qwen/weights/test_low_memory.py), and so at most in a loss."""
ADAPTER = 0.05
"""Relative L2 of what was learned. AdamW's first steps have the size of the learning rate whatever the gradient is, so that an
entry whose gradient is nothing but rounding may go either way; a thousandth of them make 6 %."""
STRATEGIES = "train/parallel/test_strategies.py::"
FROZEN = STRATEGIES + "test_quantised_and_waiting_weights_train_the_same_on_two_ranks"
KEPT = "train/model/test_denoiser.py::test_gradient_checkpointing_changes_no_gradient"


@dataclass(frozen=True)
class Variant:
    """A way to train.

    On a GPU its losses are within `bound` of its own on the CPU; on the CPU within `rounding` of those of `like`.
    """

    overrides: tuple[str, ...]
    twin: str
    bound: float = ORDER
    rounding: float = ORDER
    like: str = "single"


VARIANTS = {
    "single": Variant(("parallel=single",), "train/test_run.py::test_killed_and_continued_equals_uninterrupted"),
    "ddp": Variant(("parallel=ddp",), STRATEGIES + "test_every_way_to_split_the_work_trains_the_same"),
    "zero2": Variant(("parallel=zero2",), "scripts/test_gpu_smoke.py::test_every_combination_is_a_run"),
    "zero3": Variant(("parallel=zero3",), "scripts/test_gpu_smoke.py::test_every_combination_is_a_run"),
    "zero3_offload": Variant(("parallel=zero3_offload",), "scripts/test_gpu_smoke.py::test_every_combination_is_a_run"),
    "off": Variant(("train.gradient_checkpointing=off",), KEPT),
    "selective": Variant(("train.gradient_checkpointing=selective",), KEPT),
    "attention": Variant(("train.gradient_checkpointing=2",), KEPT),
    "full": Variant(("train.gradient_checkpointing=full",), KEPT),
    "compiled": Variant(("train.compile=on",), "train/model/test_execution.py::test_few_graphs_with_the_same_numbers"),
    "offloaded": Variant(("train.offload_blocks=2",), "train/test_run.py::test_offloaded_blocks_train_the_same"),
    "int8-offloaded": Variant(("train.offload_blocks=2", "model.weights=int8"), FROZEN, like="int8"),
    "validated": Variant(
        ("validate=tiny_lbm", "validate.num_rows=2", f"train.validate_every={STEPS}"),
        STRATEGIES + "test_validation_leaves_training_unchanged",
    ),
    # another optimizer and another loss have nothing to be like
    "prodigy": Variant(
        ("optim=prodigy",), "train/test_run.py::test_killed_and_continued_equals_uninterrupted", rounding=9
    ),
    "flow": Variant(("loss=flow",), "train/test_run.py::test_variants_train", rounding=9),
    "bf16": Variant(("model.dtype=bfloat16",), STRATEGIES + "test_bf16_within_its_rounding", BF16, BF16),
    **{name: Variant((f"model.weights={name}",), FROZEN, ORDER, rounding) for name, rounding in ROUNDED.items()},
    # where a GPU multiplies in 8 bits, which rounds activations too
    **{
        f"{name}-bf16": Variant(
            (f"model.weights={name}", "model.dtype=bfloat16"),
            "train/model/test_quantize.py::test_gradients_in_8_bits_are_near",
            BF16 + rounding,
            BF16,
            name,
        )
        for name, rounding in ROUNDED.items()
    },
}


@dataclass(frozen=True)
class Trained:
    """What a training has left."""

    losses: list[float]
    adapter: torch.Tensor
    """All exported weights as one vector."""
    run_dir: Path


class Trainings:
    """Trainings of this process, each made once.

    Args:
        settings: overrides of all of them.
        folder: for their runs.
    """

    def __init__(self, settings: list[str], folder: Path):
        self.settings, self.folder = settings, folder
        self.trained = functools.cache(self._train)

    def _train(self, name: str, device: str) -> Trained:
        run_dir = self.folder / f"{device}-{name}"
        config = compose([*self.settings, f"run_dir={run_dir}", *VARIANTS[name].overrides])
        model, processes = ModelDirectory.resolve(config.model.path), start(device)
        with pytest.MonkeyPatch.context() as patch:
            if device == "cpu":  # traced and run as it is: the compiler would take a minute
                patch.setattr(execution, "Compiled", functools.partial(execution.Compiled, backend="aot_eager"))
            cache_phase(config, model, geometry_of(config), processes)
            assert train_phase(config, model, geometry_of(config), processes, plan_run(config, model, 1)) == 0
        if name == "compiled" or device == "cuda" or config.parallel.stage:
            free()
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        tensors = load_file(run_dir / f"checkpoints/step-{STEPS:06d}/adapter_model.safetensors")
        adapter = torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])
        return Trained([line["loss"] for line in lines if "loss" in line], adapter, run_dir)


def start(device: str) -> Processes:
    """This process on the device, whatever it was on before: accelerate remembers one state."""
    PartialState._reset_state()
    return Processes.start("cpu" if device == "cpu" else None)


@pytest.fixture(scope="module")
def data(tiny_model_dir, tiny_pairs) -> list[str]:
    files = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    return ["+exp=tiny_lbm", f"model.path={tiny_model_dir}", *files]


@pytest.fixture(scope="module")
def trainings(data, tiny_cache, tmp_path_factory) -> Iterator[Trainings]:
    short = [f"train.num_steps={STEPS}", "train.micro_batch_size=2", "adapter.rank=4", "train.compile=off"]
    plain = ["validate=none", "optim=adamw", "optim.lr=3e-4", "parallel=single"]
    yield Trainings([*data, *short, *plain, f"cache.dir={tiny_cache}"], tmp_path_factory.mktemp("runs"))
    PartialState._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()


@on_devices({name: variant.twin for name, variant in VARIANTS.items()})
def test_training(trainings, device, name):
    variant = VARIANTS[name]
    found = trainings.trained(name, device.type)
    plain = device.type == "cpu" or "zero" in name  # DeepSpeed takes one device a process
    expected = trainings.trained(variant.like if plain else name, "cpu")
    bound = variant.rounding if plain else variant.bound
    assert len(found.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, rel=bound)
    assert float(found.adapter.norm()) > 0
    if bound == ORDER:
        assert float((found.adapter - expected.adapter).norm()) < ADAPTER * float(expected.adapter.norm())


@on_devices({"": STRATEGIES + "test_validation_is_shared_out_and_complete"})
def test_validation(trainings, device, name):
    """PSNR of the sampled pictures, in dB: 8-bit pixels may round otherwise."""
    file = f"validation/step-{STEPS:06d}/metrics.json"
    found, expected = (
        json.loads((trainings.trained("validated", each).run_dir / file).read_text()) for each in (device.type, "cpu")
    )
    assert found["num_rows"] == 2
    for steps in (1, 2, 4):
        assert found[f"steps_{steps}"]["psnr"] == pytest.approx(expected[f"steps_{steps}"]["psnr"], abs=0.05)


ROUNDINGS = {"float32": 2**-8, "bfloat16": 0.05}
"""Of a cached tensor, relative to its largest value. Records are in bfloat16, where a number may become its neighbour; computed
in bfloat16, the encoders' layers round too, by 3 % on the CPU."""


@on_devices(
    {
        "float32": "data_prep/cache/test_writer.py::test_records_are_what_the_encoders_give_for_the_images_of_the_row",
        "bfloat16": "",
    }
)
def test_caching(data, tiny_cache, device, name, tmp_path):
    """Every tensor of every record against the command's on the CPU, in float32."""
    config = compose([*data, f"model.dtype={name}", f"cache.dir={tmp_path}/cache", f"run_dir={tmp_path}/run"])
    cache_phase(config, ModelDirectory.resolve(config.model.path), geometry_of(config), start(device.type))
    parts = ("target_latents", "source_latents", "prompt_emb")
    found, expected = (
        {record.id: record for record in cached(Path(folder), Path(str(config.data.dataset)))}
        for folder in (config.cache.dir, tiny_cache)
    )
    assert found.keys() == expected.keys()
    for key, record in found.items():
        pairs = [(getattr(record, part), getattr(expected[key], part)) for part in parts]
        for mine, theirs in (*pairs, *zip(record.edit_latents, expected[key].edit_latents, strict=True)):
            assert float((mine - theirs).abs().max()) <= ROUNDINGS[name] * float(theirs.abs().max())
