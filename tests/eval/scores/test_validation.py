"""Validation on cached photographs, with denoisers whose answer is known."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_vae
from eval.qwen.samplers import BridgeSampler, FlowSampler
from eval.scores.fidelity import MAX_PSNR
from eval.scores.grid import GAP
from eval.scores.splits import choose_rows
from eval.scores.validation import Validation
from tests.caching import cache_dataset, write_dataset, write_rows
from train.model.denoiser import load_denoiser


class Still(nn.Module):
    """The velocity 0: a bridge that stays at the source."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.part = nn.Dropout()

    def forward(self, latents, sigma, condition):
        assert not self.training
        return self.scale * latents


class Knowing(Still):
    """Leads to the target, which it knows by its source."""

    def __init__(self, reader: CacheReader):
        super().__init__()
        self.records = list(reader)

    def forward(self, latents, sigma, condition):
        rows = [next(r for r in self.records if torch.equal(r.edit_latents[0], e)) for e in condition.edit_latents[0]]
        targets = torch.stack([row.target_latents for row in rows]).float()
        return (latents - targets) / sigma[:, None, None, None]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_model_dir):
    """A folder with six rows of two sizes, of which the first has a mask, and their cache."""
    folder = tmp_path_factory.mktemp("validation")
    cache_dataset(write_dataset(folder, write_rows(folder)), folder / "cache", tiny_model_dir)
    return folder


@pytest.fixture(scope="module")
def vae(tiny_model_dir):
    return load_vae(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)


@pytest.fixture
def validation(pairs, vae, tmp_path):
    """Makes a validation of six rows, or with other settings."""

    def make(**settings) -> Validation:
        defaults = {"num_rows": 6, "steps": [1, 2], "sampler": BridgeSampler(), "batch_size": 2}
        reader = CacheReader(pairs / "cache")
        return Validation(reader=reader, decode=vae.decode, folder=tmp_path / "validation", **(defaults | settings))

    return make


def read(validation: Validation, step: int = 0) -> dict:
    return json.loads((validation.folder / f"step-{step:06d}" / "metrics.json").read_text())


def test_files_and_numbers_have_the_promised_shape(validation):
    made = validation()
    result = made(Still(), 40)
    metrics = read(made, 40)
    assert metrics["num_rows"] == len(metrics["per_row"]) == 6
    for method in ("source", "steps_1", "steps_2"):
        assert metrics[method].keys() == {"psnr", "ssim", "psnr_edited", "psnr_background"}
        assert result.numbers[f"{method}/psnr"] == metrics[method]["psnr"]
        assert [method in row for row in metrics["per_row"]] == [True] * 6
        assert metrics["by_prompt"]["edit number 3"][method] == metrics["per_row"][3][method]
    assert [row["id"] for row in metrics["per_row"]] == [f"r{i}" for i in range(6)]
    assert [("psnr_edited" in row["source"]) for row in metrics["per_row"]] == [True, *[False] * 5]
    assert metrics["sampler"]["name"] == "BridgeSampler"
    assert result.numbers["steps_1/seconds_per_edit"] > 0
    with Image.open(result.images["validation/grid"].path) as grid:
        assert grid.format == "PNG"
        assert grid.width > 4 * 192
    assert list(result.images) == ["validation/grid", *(f"validation/row-{i}" for i in range(6))]
    shown, row = result.images["validation/row-3"], metrics["per_row"][3]
    assert shown.caption == f"edit number 3 · {row['steps_2']['psnr']:.1f} dB (r3: source, steps_2, target)"
    with Image.open(shown.path) as strip:
        assert strip.size == (3 * 64 + 2 * GAP, 64)
    assert not list(made.folder.rglob("*.tmp"))


def test_both_starts_are_validated(validation):
    """A model that stays where it starts: the source from the source, white from white."""
    made = validation(white=BridgeSampler("white"), steps=[1, 2])
    result = made(Still(), 0)
    metrics = read(made)
    assert list(metrics["seconds_per_edit"]) == ["steps_1", "steps_2", "white/steps_1", "white/steps_2"]
    assert metrics["white/steps_1"]["psnr"] < metrics["steps_1"]["psnr"] - 3
    assert result.numbers["white/steps_2/psnr"] == metrics["white/steps_2"]["psnr"]
    with Image.open(made.folder / "step-000000" / "row-3.jpg") as strip:
        middle = strip.crop((64 + GAP, 0, 128 + GAP, 64)).convert("L")
    assert sum(middle.tobytes()) / 64**2 < 200, "the edit from the source, not the one from white"
    assert made.decode(made.reader[3].sub_noise[None])[0].mean() > 0.9
    alone = validation(steps=[1])
    alone(Still(), 0)
    assert read(alone)["steps_1"] == metrics["steps_1"]


def test_the_means_are_of_the_rows(validation):
    made = validation()
    made(Still(), 0)
    metrics = read(made)
    mean = sum(row["steps_1"]["psnr"] for row in metrics["per_row"]) / 6
    assert metrics["steps_1"]["psnr"] == pytest.approx(mean)


def test_standing_still_is_the_vae_round_trip_of_the_source_and_knowing_is_that_of_the_target(validation, vae):
    made = validation(steps=[1, 4])
    made(Knowing(made.reader), 0)
    metrics = read(made)
    assert metrics["steps_1"]["psnr"] == pytest.approx(metrics["steps_4"]["psnr"], abs=0.01)
    assert metrics["steps_4"]["psnr"] > metrics["source"]["psnr"] + 3
    record = made.reader[3]
    decoded = (vae.decode(record.target_latents[None])[0].clamp(-1, 1) + 1) / 2
    with Image.open(record.row["image"]) as image:
        pixels = torch.tensor(list(image.tobytes())).view(64, 64, 3).permute(2, 0, 1) / 255
    expected = -10 * (decoded - pixels).square().mean().log10().item()
    assert metrics["per_row"][3]["steps_4"]["psnr"] == pytest.approx(expected, abs=0.01)


def test_the_source_is_scored_from_its_file(validation, pairs):
    made = validation()
    made(Still(), 0)
    arrays = []
    for name in ("s3.png", "t3.png"):
        with Image.open(pairs / name) as image:
            arrays.append(torch.tensor(list(image.tobytes())) / 255)
    expected = -10 * (arrays[0] - arrays[1]).square().mean().log10().item()
    assert read(made)["per_row"][3]["source"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_ref_gt_stands_in_for_the_target(vae, tiny_model_dir, tmp_path):
    rows = write_rows(tmp_path, 2)
    for row in rows:
        row["ref_gt"] = row["edit_image"][0]  # the truth is the source itself
    cache_dataset(write_dataset(tmp_path, rows), tmp_path / "cache", tiny_model_dir)
    made = Validation(CacheReader(tmp_path / "cache"), vae.decode, tmp_path, BridgeSampler(), steps=[1])
    made(Still(), 0)
    assert read(made)["source"]["psnr"] == MAX_PSNR


def test_same_seed_same_numbers_whatever_the_batch_and_nothing_else_is_touched(validation, tiny_model_dir):
    denoiser = load_denoiser(ModelDirectory.resolve(tiny_model_dir), dtype=torch.float32)
    denoiser.train()
    denoiser.dit.img_in.eval()
    modes, state = [m.training for m in denoiser.modules()], torch.get_rng_state()
    results = []
    for settings in ({"batch_size": 2}, {"batch_size": 1}, {"seed": 5}, {"num_rows": 3}):
        made = validation(sampler=FlowSampler(), steps=[2], **settings)
        made(denoiser, 0)
        results.append({row["id"]: row["steps_2"]["psnr"] for row in read(made)["per_row"]})
    first, alone, reseeded, fewer = results
    assert first == pytest.approx(alone, abs=1e-3)
    assert all(first[name] != reseeded[name] for name in first)
    assert len(fewer) == 3
    assert fewer == pytest.approx({name: first[name] for name in fewer}, abs=1e-3)
    assert [m.training for m in denoiser.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_choice_is_fixed_spread_and_without_repeats():
    chosen = choose_rows(1000, 8, seed=0)
    assert chosen == choose_rows(1000, 8, seed=0) == sorted(set(chosen))
    assert chosen != choose_rows(1000, 8, seed=1)
    assert max(chosen) > 500
    assert choose_rows(3, 8, seed=0) == [0, 1, 2]


def test_wrong_settings_and_lost_files_are_found_at_once(validation, pairs, vae, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"validate\.steps must be positive, got 0"):
        validation(steps=[])
    with pytest.raises(ValueError, match=r"validate\.num_rows must be positive, got 0"):
        validation(num_rows=0)
    copy = tmp_path / "copy"
    copy.mkdir()
    cache_dataset(write_dataset(copy, write_rows(copy, 2)), copy / "cache", tiny_model_dir)
    (copy / "t1.png").unlink()
    with pytest.raises(InputError, match=r"validation row 'r1' names .*t1\.png, which is gone"):
        Validation(CacheReader(copy / "cache"), vae.decode, copy, BridgeSampler())
    shutil.rmtree(copy)
