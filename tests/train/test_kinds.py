"""LoKr, and a base model that teaches, through what the command calls."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.rows.rows import EMPTY_PROMPT
from eval.request.metadata import read_metadata
from tests.commands import run_script
from tests.train.model.layers.test_lora import small
from tests.train.model.test_execution import ONE
from tests.train.model.test_extra import drawn, inputs
from tests.train.test_run import metrics
from train.builders import attach_configured, check_adapters
from train.config import compose
from train.config.training_rows import preserved_prompts
from train.model.denoiser import load_denoiser
from train.model.execution import RUNS, Compiled

LOKR = ["adapter=lokr", "adapter.rank=4", "adapter.decompose_factor=4", "optim=prodigy", "+optim.d0=1e-3"]
TAUGHT = ["loss.preserve=0.5", "data.preserve_prompts=[Blur it.,Make it brighter.]"]
MAIN = ["loss.sub_prob=0", "loss.rollout=0.5"]


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tiny_pairs, tiny_cache, tmp_path_factory) -> Path:
    """A folder of runs of two steps; `halved` was stopped after the first."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [f"model.path={tiny_model_dir}", f"data.dataset={tiny_pairs}/train.json", f"cache.dir={tiny_cache}"]
    two = [*paths, "train.num_steps=2", "train.micro_batch_size=4", "validate=none"]
    bridge = ["+exp=tiny_lbm", *two, *LOKR, *TAUGHT, *MAIN]
    flow = ["+exp=tiny_sft", *two, *TAUGHT, "adapter.rank=4", "model.weights=int8", "optim.warmup_steps=0"]
    jobs = {
        "whole": bridge,
        "halved": [*bridge, "train.num_steps=1"],
        "waiting": [*bridge, "train.offload_blocks=4"],
        "started": ["+exp=tiny_sft", *two, *LOKR, f"adapter.init_from={folder}/whole", "optim.d0=1e-30"],
        "lora": flow,
    }
    listed = [[*own, f"run_dir={folder}/{name}"] for name, own in jobs.items()]
    again = [*bridge, f"run_dir={folder}/halved"]
    (folder / "jobs.json").write_text(json.dumps([*listed, again]))
    run_script("tests/train_many.py", folder / "jobs.json")
    return folder


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-000002" / "adapter_model.safetensors")


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-000002" / "training_lora.safetensors")


def same(run: Path, other: Path, tolerance: float = 0.0) -> bool:
    mine, theirs = trained(run), trained(other)
    return mine.keys() == theirs.keys() and all((mine[n] - theirs[n]).abs().max() <= tolerance for n in mine)


def test_lokr_is_continued_exactly_and_trains_the_same_where_blocks_wait(runs):
    whole, start = trained(runs / "whole"), [name for name in trained(runs / "whole") if name.endswith(".lokr_w2_b")]
    assert len(start) > 10
    assert all(whole[name].abs().max() > 0 for name in start)
    assert same(runs / "halved", runs / "whole")
    assert metrics(runs / "halved") == metrics(runs / "whole")
    assert same(runs / "waiting", runs / "whole")


def test_the_average_is_exported_under_comfyuis_names(runs):
    """Of ProdigyPlusScheduleFree, which is not what is trained."""
    tensors, own = exported(runs / "whole"), trained(runs / "whole")
    assert tensors.keys() == {f"diffusion_model.{name}" for name in own} | {
        f"diffusion_model.{name.rpartition('.')[0]}.alpha" for name in own
    }
    differing = [name for name in own if not torch.equal(tensors[f"diffusion_model.{name}"], own[name])]
    assert len(differing) > len(own) / 2
    metadata = read_metadata(runs / "whole" / "checkpoints" / "step-000002")
    assert (metadata["kind"], json.loads(metadata["loss"])["preserve"]) == ("lokr", 0.5)


def test_a_run_starts_from_lokr(runs):
    """With another objective; nothing moves by more than a step size that never grows."""
    before, after = exported(runs / "whole"), exported(runs / "started")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_the_teacher_is_the_base_model_whose_answer_moves_no_further(runs):
    """Over full and over 8-bit weights; at first there is nothing to correct."""
    for run in ("whole", "lora"):
        first, second = (line["loss/preserve"] for line in metrics(runs / run))
        assert first < 1e-8
        assert 1e-8 < second < 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "weights"), [("lora", "bf16"), ("lora", "int8"), ("lokr", "bf16"), ("lokr", "int8"), ("ste", "bf16")]
)
def test_without_its_adapter_a_denoiser_is_the_base_model(tiny_model_dir, kind, weights):
    model = ModelDirectory.resolve(tiny_model_dir)
    base, denoiser = (load_denoiser(model, dtype=torch.float32, weights=weights) for _ in range(2))
    config = compose(["+exp=tiny_lbm", "data.dataset=rows.json", f"adapter={kind}", "adapter.train_modules=[]"])
    adapter = attach_configured(denoiser, config)
    for name, weight in adapter.named_parameters().items():
        if kind != "ste" or name.startswith("modules."):
            weight.add_(0.05 * drawn(*weight.shape, seed=len(name)))
    adapter.copy_for_products(denoiser.dit.transformer_blocks, torch.float32)
    adapter.refresh()
    adapted = denoiser(*inputs(base))
    with denoiser.without_adapter():
        assert torch.equal(denoiser(*inputs(base)), base(*inputs(base)))
    assert torch.equal(denoiser(*inputs(base)), adapted)
    assert not torch.allclose(adapted, base(*inputs(base)), atol=0.1)


def test_compiled_blocks_notice_that_the_adapter_is_off():
    """The same blocks are traced with it and without it."""
    denoiser, _ = small(torch.float32)
    with torch.no_grad(), denoiser.without_adapter():
        expected = denoiser(*ONE[0])
    for block in denoiser.dit.transformer_blocks:
        block.run = Compiled(RUNS["nothing"], print, backend="eager")
    with torch.no_grad():
        adapted = denoiser(*ONE[0])
        with denoiser.without_adapter():
            assert torch.equal(denoiser(*ONE[0]), expected)
        assert torch.equal(denoiser(*ONE[0]), adapted)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    torch._dynamo.reset()


def test_instructions_are_the_empty_one_by_default_and_none_where_nothing_is_preserved():
    base = ["+exp=tiny_lbm", "data.dataset=rows.json"]
    assert preserved_prompts(compose(base)) == ()
    assert preserved_prompts(compose([*base, "loss.preserve=0.1"])) == (EMPTY_PROMPT,)
    assert preserved_prompts(compose([*base, *TAUGHT, "data.preserve_prompts=[Blur it.,'']"])) == (
        "Blur it.",
        EMPTY_PROMPT,
    )


def test_a_lokr_adapter_lies_under_a_lora_but_not_in_its_file(runs, tiny_model_dir):
    model = ModelDirectory.resolve(tiny_model_dir)
    base = ["+exp=tiny_lbm", f"model.path={tiny_model_dir}", "data.dataset=rows.json", f"adapter.frozen=[{runs}/whole]"]
    check_adapters(compose(base), model)
    with pytest.raises(
        InputError, match=r"is a LoKr adapter, which adapter.export_frozen=true cannot merge into a LoRA"
    ):
        check_adapters(compose([*base, "adapter.export_frozen=true"]), model)
