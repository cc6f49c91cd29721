"""What accelerate passes to a process, against what the configuration says; and what DeepSpeed is told."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from train.builders import check_nodes
from train.config import compose
from train.loop import TrainingDiverged, check_agreement, over_ranks
from train.optim import AdamW
from train.parallel.processes import check_launch
from train.parallel.settings import check_settings, launched_settings, zero_settings
from train.plan.advice import AUTOMATIC, savings
from train.record.resume import MAY_CHANGE

USERS = {
    "stage": 3,
    "offload": False,
    "bucket_size": 500_000_000,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "options": {},
}

RUN = {"micro_batch_size": 2, "grad_accum_steps": 16, "world_size": 4, "max_grad_norm": None}


def test_the_settings_for_96_gb():
    """As users set them: no offload, buckets of 5e8, no clipping and no precision section, and torch's own linear."""
    given = zero_settings(**USERS, micro_batch_size=1, grad_accum_steps=16)
    zero = given["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (3, True, True)
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 500_000_000
    assert zero["memory_efficient_linear"] is False
    assert not {"gradient_clipping", "bf16", "fp16", "optimizer", "scheduler"} & given.keys()
    assert not {"offload_param", "offload_optimizer"} & zero.keys()
    assert given["gradient_accumulation_steps"] == 16


def test_the_users_own_settings_win():
    launched = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 1.0,
        "comms_logger": {"enabled": True},
    }
    given = zero_settings(**USERS, micro_batch_size=1, grad_accum_steps=1, launched=launched)
    assert given["zero_optimization"]["reduce_bucket_size"] == 7
    assert given["comms_logger"] == {"enabled": True}
    assert "gradient_clipping" not in given
    assert "offload_optimizer" not in given["zero_optimization"]


def test_settings_of_the_command_line_are_read(monkeypatch):
    """`accelerate launch --use_deepspeed --zero_stage 3` passes these; "auto" is nobody's wish."""
    assert launched_settings({}) is None
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    launched = launched_settings({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert launched is not None
    assert launched["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(launched)
    check_settings(launched, stage=3, offload=False, **RUN)


def test_a_deepspeed_file_without_zero_is_refused(monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(
        InputError, match="accelerate's DeepSpeed configuration cannot be used: Please specify the ZeRO"
    ):
        launched_settings({"ACCELERATE_USE_DEEPSPEED": "true"})


OFFLOADED = {"offload_param": {"device": "cpu"}}
REFUSED = {
    "stage": ({"zero_optimization": {"stage": 2}}, "DeepSpeed's ZeRO stage 2, but parallel=zero3"),
    "weights": (
        {"zero_optimization": OFFLOADED},
        "offload_param cpu and offload_optimizer none, but parallel=zero3: use",
    ),
    "optimizer": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "offload_param none and offload_optimizer cpu, but parallel=zero3",
    ),
    "disk": ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param nvme"),
    "accumulation": (
        {"gradient_accumulation_steps": 4},
        "gradient_accumulation_steps 4, but train.grad_accum_steps=16",
    ),
    "micro": ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu 7, but train.micro_batch_size=2"),
    "batch": (
        {"train_batch_size": 99},
        "train_batch_size 99, but train.micro_batch_size x ",
    ),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping 1.0, but train.max_grad_norm=null"),
    "precision": ({"bf16": {"enabled": True}}, "bf16 section, but model.dtype decides the precision"),
    "owned": ({"optimizer": {"type": "AdamW"}}, "optimizer section, but optim= decides that"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_name_both_sides(case):
    launched, message = REFUSED[case]
    with pytest.raises(InputError, match=r"^accelerate was launched with DeepSpeed's") as caught:
        check_settings(launched, stage=3, offload=False, **RUN)
    assert message in str(caught.value)


def test_offload_must_be_meant_on_both_sides():
    check_settings({"zero_optimization": OFFLOADED}, stage=3, offload=True, **RUN)
    with pytest.raises(InputError, match="offload_param none and offload_optimizer none, but parallel=zero3_offload"):
        check_settings({"zero_optimization": {}}, stage=3, offload=True, **RUN)


LAUNCHES = [
    ("single", "float32", {"WORLD_SIZE": "2"}, "parallel=single trains on one process, but 2 were launched"),
    ("ddp", "float32", {"ACCELERATE_USE_DEEPSPEED": "true"}, "launched with DeepSpeed, but parallel=ddp"),
    ("zero3", "float32", {"ACCELERATE_USE_FSDP": "true"}, "launched with FSDP, but parallel=zero3"),
    ("zero3", "float32", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "launched with Megatron-LM, but parallel=zero3"),
    ("ddp", "float32", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision bf16, but model.dtype=float32"),
    ("ddp", "bfloat16", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16, but model.dtype=bfloat16"),
]


@pytest.mark.parametrize(("strategy", "dtype", "environment", "message"), LAUNCHES)
def test_launches_that_contradict_are_refused(strategy, dtype, environment, message):
    with pytest.raises(InputError) as caught:
        check_launch(strategy, dtype, environment)
    assert message in str(caught.value)


def test_launches_that_agree_are_taken():
    check_launch("ddp", "bfloat16", {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "8"})
    check_launch("zero3", "float32", {"ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.offload=true", "parallel.offload=true needs parallel.strategy=zero3, got auto"),
        ("parallel.bucket_size=0", "parallel.bucket_size must be at least 1, got 0"),
        (
            "parallel.zero_options={x:2}",
            "parallel.zero_options takes its keys one by one: +parallel.zero_options.NAME=VALUE",
        ),
        ("+parallel.zero_options.stage=2", "parallel.zero_options has stage, which parallel=NAME decides"),
        ("train.device=cuda:3", "train.device must be cpu or null (automatic), got 'cuda:3'"),
        ("parallel=zero4", "there is no configs/parallel/zero4.yaml: did you mean parallel=zero"),
    ],
)
def test_wrong_parallel_settings(override, message):
    with pytest.raises(InputError) as caught:
        compose(["+exp=tiny_lbm", "data.dataset=x", override])
    assert message in str(caught.value)


def test_accumulation_and_global_batch_contradict_each_other():
    with pytest.raises(
        InputError, match=r"grad_accum_steps=4 and train\.global_batch_size=16 both set the number of forward passes"
    ):
        compose(["+exp=lbm_2511", "data.dataset=x", "train.grad_accum_steps=4"])


def test_what_the_plan_calls_harmless_can_be_changed_in_a_continued_run():
    """After an out-of-memory error a user follows the plan's advice and gives the command again."""
    config = compose(["+exp=tiny_lbm", "data.dataset=x", "parallel=zero3", "train.micro_batch_size=4"])
    keys = {*AUTOMATIC, *(key for change in savings(config) for key in change)}
    assert {"train.gradient_checkpointing", "train.micro_batch_size"} <= keys
    assert all(any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE) for key in keys)


def test_caching_takes_any_launch(monkeypatch, tiny_model_dir):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    arguments = ["+exp=tiny_lbm", "data.dataset=x", f"model.path={tiny_model_dir}"]
    check_nodes(compose([*arguments, "phases=[cache]"]), ModelDirectory(tiny_model_dir))
    with pytest.raises(InputError, match="launched with DeepSpeed, but parallel=auto"):
        check_nodes(compose(arguments), ModelDirectory(tiny_model_dir))


@dataclass
class Others:
    """Processes of which the others pass what they are given here."""

    values: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.values]


@dataclass
class Weights:
    weight: nn.Parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach()}


def test_means_are_over_all_samples_and_not_over_ranks():
    """Hand-computed: rank 0 has 1 masked sample and rank 1 three; a rank without any counts for nothing."""
    others = Others([({"loss": (6.0, 2), "loss/mask": (9.0, 3), "seconds/step": (4.0, 1)}, {"memory_peak_gib": 3.0})])
    own = {"loss": (1.0, 2), "loss/mask": (1.0, 1), "loss/sub": (0.0, 0), "seconds/step": (2.0, 1)}
    numbers = over_ranks(others, own, {"memory_peak_gib": 2.0})  # type: ignore[arg-type]
    assert numbers == {"loss": 7 / 4, "loss/mask": 10 / 4, "seconds/step": 3.0, "memory_peak_gib": 3.0}


def test_ranks_that_disagree_stop_the_run():
    weights = Weights(nn.Parameter(torch.ones(3)))
    optimizer = AdamW([weights.weight], lr=0.1)
    check_agreement(Others([(3.0, {"lr": 0.1})]), 5, weights, optimizer)  # type: ignore[arg-type]
    for theirs in ((3.0000001, {"lr": 0.1}), (3.0, {"lr": 0.2})):
        with pytest.raises(TrainingDiverged, match="step 5: the ranks disagree"):
            check_agreement(Others([theirs]), 5, weights, optimizer)  # type: ignore[arg-type]
