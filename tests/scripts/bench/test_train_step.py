"""`scripts/bench/train_step.py` races what it says it races."""

import gc
import json
import weakref

import pytest
import torch
from diffsynth.models.qwen_image_dit import QwenImageDiT

from scripts.bench.train_step import DEFAULT_ROWS, ROWS, Contender, Race, kept_words, kind_of, parse_arguments
from scripts.bench.trainers import DTYPE, Ours, Theirs, make_batch, share
from scripts.gpu_smoke import RandomModel, write_model
from tests.commands import run_script
from train.config import DEFAULT_TARGETS
from train.model.adapter import attach_lora
from train.model.denoiser import build_dit, load_denoiser
from train.model.execution import Execution
from train.parallel.processes import Processes

pytestmark = pytest.mark.slow

BENCH = "scripts/bench/train_step.py"
ROWS_OF_THE_TEST = f"{DEFAULT_ROWS},attention,fp8,int8,nf4,offload"


def test_every_row_at_the_tiny_size(tmp_path):
    done = run_script(
        BENCH,
        "--tiny",
        "--rounds",
        "1",
        "--json",
        tmp_path / "found.json",
        "--profile",
        "full",
        "--rows",
        ROWS_OF_THE_TEST,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert list(rows) == ROWS_OF_THE_TEST.split(",")
    assert not any("failed" in row for row in rows.values())
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in rows]
    assert lines == list(rows)
    for name, row in rows.items():
        if name in ("adamw", "prodigy"):
            assert row["optimizer"] > 0
            continue
        assert sum(row[part] for part in ("data", "forward", "backward", "optimizer")) == pytest.approx(
            row["s/step"], rel=0.1
        )
        samples = 2 if name.startswith("mb2") else 1
        assert row["samples/s"] == pytest.approx(samples / row["s/step"])
        assert row["TFLOP/s"] == pytest.approx(found["TFLOP of a sample"] * row["samples/s"])
        assert len(row["steps"]) == 2
        if name != "theirs":
            others = samples if row["against"] == "mb2" else 1
            assert row["ratio"] == pytest.approx(row["samples/s"] / (others / row["other"]))
    assert {name: row.get("against") for name, row in rows.items()}["mb2-mixed"] == "mb2"
    assert rows["full"]["kept"] == "nothing"
    assert rows["auto"]["kept"] == "all"  # the tiny model fits everywhere
    assert rows["attention"]["kept"] == "attention"
    kernels = rows["full"]["profile"]
    assert sum(kernels["kinds"].values()) == pytest.approx(kernels["ms"])
    assert kernels["kinds"]["matrix products"] > 0
    assert "launches" in done.stdout


@pytest.mark.parametrize(("name", "dtype", "waiting"), [("int8", torch.int8, 0), ("offload", DTYPE, 2)])
def test_a_row_with_its_own_weights_leaves_the_shared_ones(tmp_path, monkeypatch, name, dtype, waiting):
    """And they are gone when it is over, but for what is shared."""
    monkeypatch.setattr("sys.argv", [BENCH, "--tiny", "--layers", "5", "--rows", name, "--device", "cpu"])
    race = Race(parse_arguments(), tmp_path)
    before = {key: weight.data_ptr() for key, weight in race.theirs.pipe.dit.named_parameters()}
    contender = race.contender(name)
    contender.warm_up()
    ours = contender.step.func.__self__
    denoiser = weakref.ref(ours.parallel.denoiser)
    block = denoiser().dit.transformer_blocks[0]
    assert block.img_mlp.net[2].base_layer.weight.dtype == dtype
    assert len(denoiser().offload.waiting if waiting else []) == waiting
    assert contender.others() == race.theirs.held + race.theirs.frozen + race.ours.held
    frozen = sum(weight.nbytes for weight in race.ours.parallel.denoiser.parameters() if not weight.requires_grad)
    assert race.theirs.frozen == frozen
    assert before == {key: weight.data_ptr() for key, weight in race.theirs.pipe.dit.named_parameters()}
    race.finish(name)
    del contender, ours, block
    gc.collect()
    assert denoiser() is None
    shared = race.contender("full")
    race.finish("full")
    assert race.contender("full") is shared


def test_a_row_that_fails_is_named_and_the_others_are_measured(tmp_path):
    """Pictures of 24 pixels have latents of 3 cells, which make no tokens."""
    arguments = ["--tiny", "--side", "24", "--rows", "theirs,adamw", "--json", tmp_path / "found.json"]
    done = run_script(BENCH, *arguments, check=False)
    assert done.returncode == 1
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert "failed" in rows["theirs"]
    assert rows["theirs"]["failed"] in done.stdout
    assert rows["adamw"]["optimizer"] > 0


def test_no_row_begins_when_time_is_up():
    done = run_script(BENCH, "--tiny", "--seconds", "0", "--rows", "theirs,full", check=False)
    assert done.returncode == 1
    assert done.stdout.count("not begun") == 2


def test_unknown_rows_are_refused():
    done = run_script(BENCH, "--tiny", "--rows", "theirs,fastest", check=False)
    assert done.returncode == 2
    assert "got fastest" in done.stderr


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Both trainers on one tiny model."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "tiny", num_layers=2)
    model = RandomModel(folder)
    denoiser = load_denoiser(model, "cpu", DTYPE)
    frozen = dict(denoiser.dit.named_parameters())
    theirs = share(denoiser.dit, model.config("transformer"))
    shared = dict(theirs.named_parameters())
    adapter = attach_lora(denoiser, 4, 4, DEFAULT_TARGETS)
    ours = Ours(denoiser, adapter, Processes.start("cpu"))
    return ours, Theirs(theirs, adapter, denoiser.zero_cond_t, torch.device("cpu")), frozen, shared


def test_both_compute_with_the_same_frozen_tensors(sides):
    _, _, frozen, shared = sides
    assert frozen.keys() == shared.keys()
    assert all(frozen[name].data_ptr() == shared[name].data_ptr() for name in frozen)
    assert not any(parameter.requires_grad for parameter in shared.values())


def test_theirs_is_diffsynths_transformer(tmp_path):
    """Module for module, at the real sizes, which are literals there."""
    write_model(tmp_path, "full", num_layers=2)
    config = RandomModel(tmp_path).config("transformer")
    with torch.device("meta"):
        assert str(share(build_dit(config), config)) == str(QwenImageDiT(num_layers=2))


def test_both_have_the_same_lora_and_train_it(sides):
    ours, theirs, _, _ = sides
    assert len(ours.parameters) == len(theirs.parameters)
    for own, other in zip(ours.parameters, theirs.parameters, strict=True):
        assert other.dtype == DTYPE
        assert torch.equal(own.to(DTYPE), other)
    batch = make_batch([12], 64, 16)
    before = [[p.detach().clone() for p in side.parameters] for side in (ours, theirs)]
    ours.switch(ours.execute(Execution()))
    for side, old in zip((ours, theirs), before, strict=True):
        seconds = side.step(batch, 0)
        assert list(seconds) == ["data", "forward", "backward", "optimizer", "step"]
        changed = sum(not torch.equal(a, b) for a, b in zip(side.parameters, old, strict=True))
        assert changed > 0.9 * len(old)
        assert side.held > 3 * sum(p.nbytes for p in side.parameters)  # weights, and AdamW's two moments


def test_what_blocks_keep_in_words():
    assert kept_words(["all", "all"]) == "all"
    assert kept_words(["attention", "products", "products"]) == "1 attention, 2 products"


def test_samples_of_a_row():
    assert ROWS["full"].lengths(250) == [250]
    assert ROWS["mb2"].lengths(250) == [250, 250]
    assert ROWS["mb2-mixed"].lengths(250) == [250, 213]
    assert ROWS["mb4"].lengths(12) == [12] * 4


def test_texts_of_different_lengths_are_padded():
    batch = make_batch([12, 9], 64, 16)
    assert batch.condition.prompt_emb_mask.sum(dim=1).tolist() == [12, 9]
    assert batch.condition.prompt_emb.shape == (2, 12, 16)
    assert batch.target_latents.shape == (2, 16, 8, 8)


def test_a_contender_warms_up_once():
    steps = []

    def step(number: int) -> dict[str, float]:
        steps.append(number)
        return {"forward": 1.0, "step": 3.0}

    contender = Contender(lambda: None, step, 1)
    contender.warm_up()
    contender.warm_up()
    assert steps == [0, 1]
    assert contender.first == 3.0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("triton_poi_fused_addcmul_0", "compiled pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("aten::addmm", "matrix products"),
    ],
)
def test_kernels_by_kind(kernel, kind):
    assert kind_of(kernel) == kind
