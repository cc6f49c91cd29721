"""Runs that start from another adapter, or lie over one, through what the command calls."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from eval.request.knobs import AdapterUse
from eval.request.metadata import left_out, read_metadata
from tests.commands import run_script
from train.builders import attach_configured, check_adapters
from train.config import compose
from train.model.denoiser import load_denoiser

STILL = ["optim.lr=1e-30", "adapter.rank=6", "validate=none"]
"""Nothing moves by more than float32 drops."""
IN_FULL = ["norm_out", "proj_out"]
"""What `adapter=ste` trains in full."""


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tiny_pairs, tiny_cache, tmp_path_factory) -> Path:
    """A folder of two-step runs: `first`; `started` from it; `over` it; `both`, which exports it too; and `grown` from the
    adapter `ste`, which is more than LoRA and was never trained."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["adapter=ste", "adapter.modules.ste.hidden=8", "adapter.target_modules=[to_q]"]
    denoiser = load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32, train_modules=IN_FULL)
    extended = attach_configured(denoiser, compose(["+exp=tiny_lbm", "data.dataset=rows.json", *more, "seed=5"]))
    for weight in extended.extras.parameters.values():
        weight.data.add_(0.01)
    extended.export(folder / "ste", {})
    paths = [f"model.path={tiny_model_dir}", f"data.dataset={tiny_pairs}/train.json", f"cache.dir={tiny_cache}"]
    short = ["+exp=tiny_lbm", *paths, "train.num_steps=2", "train.micro_batch_size=2"]
    over = [*STILL, f"adapter.frozen=[{folder}/first]", "adapter.target_modules=[to_q]"]
    jobs = {
        "first": ["adapter.rank=4", "adapter.rank_pattern={img_mod.1: 2}", "optim.ema=0.5", "validate=none"],
        "started": [*STILL, f"adapter.init_from={folder}/first"],
        "over": over,
        "both": [*over, "adapter.export_frozen=true"],
        "grown": [*STILL, *more, "adapter.rank=32", f"adapter.init_from={folder}/ste"],
    }
    file = folder / "jobs.json"
    file.write_text(json.dumps([[*short, f"run_dir={folder}/{name}", *own] for name, own in jobs.items()]))
    run_script("tests/train_many.py", file)
    return folder


def products(run: Path) -> dict[str, torch.Tensor]:
    """Module -> what its exported adapter adds to the weight."""
    tensors = load_file(run / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


@pytest.mark.parametrize("name", ["started", "both"])
def test_the_start_is_what_the_adapter_was(runs, name):
    first, other = products(runs / "first"), products(runs / name)
    assert first.keys() == other.keys()
    for module, product in first.items():
        assert torch.allclose(other[module], product, rtol=1e-5, atol=1e-9)
    assert max(product.abs().max() for product in first.values()) > 1e-5


def test_a_run_starts_from_all_that_was_trained(runs):
    """What was trained in full and what was added, bit for bit."""
    start, other = (
        load_file(folder / "extra_modules.safetensors")
        for folder in (runs / "ste", runs / "grown" / "checkpoints" / "step-000002")
    )
    assert start.keys() == other.keys() >= {"norm_out.linear.bias", "proj_out.weight", "modules.ste.leave.weight"}
    assert all(torch.equal(other[name], start[name]) for name in start)


def test_an_adapter_over_another_says_so(runs):
    over, both, first = (AdapterUse(runs / name / "checkpoints" / "step-000002") for name in ("over", "both", "first"))
    assert all(product.abs().max() < 1e-9 for product in products(runs / "over").values())
    (note,) = left_out([over])
    assert note.endswith(f"was trained on top of {runs}/first, which is not in use: add --adapter {runs}/first")
    assert left_out([over, first]) == left_out([both]) == []
    assert "frozen" not in read_metadata(both.path)


def test_what_does_not_fit_is_refused_before_caching(runs, tiny_model_dir):
    model = ModelDirectory.resolve(tiny_model_dir)
    base = ["+exp=tiny_lbm", f"model.path={tiny_model_dir}", "data.dataset=rows.json"]
    with pytest.raises(InputError, match=r"has rank 4 in img_in, more than the 3 here: set adapter.rank=4"):
        check_adapters(compose([*base, "adapter.rank=3", f"adapter.init_from={runs}/first"]), model)
    with pytest.raises(InputError, match="no adapter at "):
        check_adapters(compose([*base, f"adapter.frozen=[{runs}/frist]"]), model)
    with pytest.raises(InputError, match=r"has modules.ste.* of shape .*, which adapter.modules leaves out or gives"):
        check_adapters(
            compose([*base, f"adapter.init_from={runs}/ste", "adapter.train_modules=[norm_out,proj_out]"]), model
        )
    with pytest.raises(
        InputError, match="ste was trained with modules beside LoRA, so it cannot be frozen under another"
    ):
        check_adapters(compose([*base, f"adapter.frozen=[{runs}/ste]"]), model)
    with pytest.raises(InputError, match=r"first changes proj_out, which adapter.train_modules trains in full: remove"):
        check_adapters(compose([*base, f"adapter.frozen=[{runs}/first]", "adapter.train_modules=[proj_out]"]), model)
