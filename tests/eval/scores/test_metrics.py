"""Metrics against numbers worked out by hand, and against the models' own outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from scipy.linalg import sqrtm
from skimage import data
from torchmetrics.functional.image import (
    deep_image_structure_and_texture_similarity,
    learned_perceptual_image_patch_similarity,
    structural_similarity_index_measure,
)
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, ViTModel

from data_prep.errors import InputError
from data_prep.model.geometry import to_image
from eval.scores.fidelity import ssim, ssim_map
from eval.scores.metrics import identity
from eval.scores.metrics.catalog import load_battery
from eval.scores.metrics.clip import Clip
from eval.scores.metrics.dino import Dino
from eval.scores.metrics.fid import Fid
from eval.scores.metrics.identity import Identity
from eval.scores.metrics.metric import METRICS, NEUTRAL, Example, Unavailable
from eval.scores.metrics.perceptual import Dists, Lpips, LpipsPie
from eval.scores.metrics.pixels import Pixels
from eval.scores.metrics.registration import Registration
from eval.scores.metrics.sources import Places
from tests.tiny_weights import write_backbones, write_clip, write_dino, write_features

PIXELS = Pixels()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    """Tiny random models of every kind."""
    folder = tmp_path_factory.mktemp("weights")
    return Places(
        clip=str(write_clip(folder / "clip")),
        dino=str(write_dino(folder / "dino")),
        torch_hub=write_backbones(folder / "hub"),
        fid=write_features(folder / "mean.pt2"),
    )


def example(prediction, target=None, source=None, background=None, **more) -> Example:
    """Pictures, equal where they are not given."""
    target = prediction if target is None else target
    source = target if source is None else source
    return Example(
        more.get("id", "row"), more.get("prompt", "make it red"), "steps_1", prediction, target, source, background
    )


def noise(seed: int, size: int = 64) -> torch.Tensor:
    """Pixels of an 8-bit picture."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, size, size), generator=generator).float() / 255


def grey(value: float, size: int = 32) -> torch.Tensor:
    return torch.full((3, size, size), value)


def photograph(size: int = 128) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((size, size), Image.Resampling.LANCZOS)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_ssim_is_that_of_torchmetrics_wherever_a_window_fits():
    one, other = noise(0), 0.3 * noise(1) + 0.4
    batches = one[None].double(), other[None].double()
    _, full = structural_similarity_index_measure(*batches, data_range=1.0, return_full_image=True)
    inside = full[0, :, 5:-5, 5:-5]
    assert ssim(one, other) == pytest.approx(inside.mean().item(), abs=1e-9)
    assert torch.allclose(ssim_map(one, other)[1][5:-5, 5:-5], inside.mean(0))


def test_a_part_counts_by_its_own_area_or_as_in_pie_bench():
    """A quarter is edited, with an error of 0.2 to the target; the background is off by 0.1 to the source."""
    background = torch.ones(32, 32, dtype=torch.bool)
    background[:16, :16] = False
    target, source = grey(0.5), grey(0.4)
    prediction = torch.where(background, grey(0.5), grey(0.7))
    scores = PIXELS(example(prediction, target, source, background))
    assert scores.keys() == {name for name, metric in METRICS.items() if metric.family == "pixels.Pixels"}
    assert scores["mse"] == pytest.approx(1000 * 0.25 * 0.2**2, rel=1e-4)
    assert scores["mse_edited"] == pytest.approx(1000 * 0.2**2, rel=1e-4)
    assert scores["mse_edited_pie"] == pytest.approx(1000 * 0.25 * 0.2**2, rel=1e-4)
    assert scores["mse_background"] == 0
    assert scores["mse_background_pie"] == pytest.approx(1000 * 0.75 * 0.1**2, rel=1e-4)
    assert scores["psnr_edited"] == pytest.approx(-10 * np.log10(0.04), abs=1e-3)
    assert scores["psnr_edited_pie"] == pytest.approx(-10 * np.log10(0.01), abs=1e-3)
    assert scores["psnr_background_pie"] == pytest.approx(-10 * np.log10(0.75 * 0.01), abs=1e-3)


def test_ssim_of_a_part_is_the_mean_of_its_windows():
    background = torch.zeros(64, 64, dtype=torch.bool)
    background[:, 32:] = True
    one, other = noise(2), noise(3)
    scores = PIXELS(example(one, other, other, background))
    both = ssim_map(one, other)[1]
    assert scores["ssim_edited"] == pytest.approx(both[:, :32].mean().item())
    assert scores["ssim_background"] == pytest.approx(both[:, 32:].mean().item())
    assert scores["ssim_background_pie"] == pytest.approx(ssim(one * background, other * background))


def test_rows_without_a_mask_or_without_a_part_have_no_such_score():
    assert PIXELS(example(noise(0))).keys() == {"psnr", "ssim", "mse"}
    everywhere = torch.ones(64, 64, dtype=torch.bool)
    assert "psnr_edited" not in PIXELS(example(noise(0), background=everywhere))


def test_a_shift_and_a_zoom_are_found():
    source = photograph(256)
    moved = Image.new("RGB", source.size)
    moved.paste(source, (3, 4))
    scores = Registration()(example(pixels(moved), source=pixels(source)))
    assert scores["drift_shift"] == pytest.approx(5, abs=0.3)
    assert (scores["drifted"], scores["drift_unknown"]) == (1, 0)
    zoomed = source.resize((264, 264), Image.Resampling.LANCZOS).crop((4, 4, 260, 260))
    scores = Registration()(example(pixels(zoomed), source=pixels(source)))
    assert scores["drift_zoom"] == pytest.approx(100 * 8 / 256, abs=0.2)
    assert Registration()(example(pixels(source)))["drifted"] == 0
    assert Registration()(example(grey(0.5, 64), source=grey(0.5, 64))) == {"drift_unknown": 1.0}


def test_clip_by_the_models_own_joint_output(places):
    one, target, source = noise(4), noise(5), noise(6)
    scores = Clip(places)(example(one, target, source, prompt="make it red"))
    model, processor = CLIPModel.from_pretrained(places.clip), CLIPProcessor.from_pretrained(places.clip)
    images = [to_image(each * 2 - 1) for each in (one, target, source)]
    inputs = processor(text=["make it red", NEUTRAL], images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    cosines = output.logits_per_image / model.logit_scale.exp()
    assert scores["clip_score"] == pytest.approx(100 * max(0, cosines[0, 0].item()), abs=1e-3)
    picture, truth, before = output.image_embeds
    words, neutral = output.text_embeds

    def cos(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a @ b / a.norm() / b.norm()).item()

    assert scores["clip_direction"] == pytest.approx(cos(picture - before, words - neutral), abs=1e-3)
    assert scores["clip_direction_target"] == pytest.approx(cos(picture - before, truth - before), abs=1e-3)
    assert scores["clip_i"] == pytest.approx(cos(picture, truth), abs=1e-4)
    assert Clip(places)(example(one))["clip_i"] == pytest.approx(1)


def test_structure_is_of_the_last_layers_keys(places):
    one, source = noise(7), noise(8)
    scores = Dino(places)(example(one, one, source))
    model, processor = ViTModel.from_pretrained(places.dino), AutoImageProcessor.from_pretrained(places.dino)
    layer, similarities = model.layers[-1], []
    for picture in (one, source):
        with torch.no_grad():
            inputs = processor(images=to_image(picture * 2 - 1), return_tensors="pt")
            before = model(**inputs, output_hidden_states=True).hidden_states[-2]
            keys = layer.attention.k_proj(layer.layernorm_before(before))[0]
        unit = keys / keys.norm(dim=1, keepdim=True)
        similarities.append(unit @ unit.T)
    expected = 1000 * (similarities[0] - similarities[1]).square().mean().item()
    assert scores["structure"] == pytest.approx(expected, rel=1e-3)
    assert scores["dino"] == pytest.approx(1)


def test_perceptual_distances_are_nothing_for_equal_pictures_and_do_not_remember(places):
    background = torch.zeros(64, 64, dtype=torch.bool)
    background[:, 32:] = True
    same = example(noise(9), background=background)
    changed = noise(9)
    changed[:, :, :32] = noise(10)[:, :, :32]  # the edited part alone
    other = example(changed, noise(9), noise(9), background)
    for family in (Lpips(places), LpipsPie(places), Dists(places)):
        (name,) = (each for each, metric in METRICS.items() if metric.family.endswith(f".{type(family).__name__}"))
        assert family(same)[name] == pytest.approx(0, abs=1e-5)
        first = family(other)
        assert (first[name] > 1e-4) == (name != "lpips_background_pie")
        family(same)
        assert family(other) == first


def test_fid_of_features_that_are_known(places):
    """Mean colours: |difference of means|² + trace(C1 + C2 − 2·sqrt(C1·C2))."""
    family, pictures = Fid(places), [(noise(20 + i, 32) * 0.5 * (1 + i / 9), noise(40 + i, 32)) for i in range(6)]
    for number, (one, target) in enumerate(pictures):
        if number == 3:
            with pytest.raises(Unavailable, match="3 pictures are not enough"):
                family.result("steps_1")
        family.add(example((one * 255).round() / 255, target, id=f"row-{number}"))
    features = np.array([[each.mul(255).round().div(255).mean((1, 2)).numpy() for each in pair] for pair in pictures])
    made, real = features[:, 0].astype(float), features[:, 1].astype(float)
    covariances = np.cov(made.T), np.cov(real.T)
    cross = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((made.mean(0) - real.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * cross
    assert family.result("steps_1")["fid"] == pytest.approx(expected, rel=1e-3)


def test_a_face_is_recognised_by_dlibs_real_weights():
    pytest.importorskip("dlib")
    try:
        family = Identity(Places())
    except Unavailable:
        pytest.skip("the package with dlib's models is not installed")
    face = pixels(Image.fromarray(data.astronaut()).crop((120, 0, 320, 200)))
    scores = family(example((0.8 * face + 0.1).flip(2), source=face))
    assert scores["face_kept"] == 1
    assert 0 < scores["identity"] < 0.6
    assert family(example(face, source=face))["identity"] == 0
    assert family(example(noise(0, 200), source=face)) == {"face_kept": 0}
    assert family(example(face, source=noise(0, 200), id="no face")) == {}


def test_what_cannot_be_had_says_why(places, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PACKAGE", "no_such_package")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    empty = Places(clip=str(tmp_path), dino="nobody/nothing", torch_hub=tmp_path, fid=tmp_path / "x.pt2")
    battery = load_battery(None, empty)
    assert [type(family).__name__ for family in battery.families] == ["Pixels", "Registration"]
    weightless = ("pixels.Pixels", "registration.Registration")
    assert battery.unavailable.keys() == {name for name, each in METRICS.items() if each.family not in weightless}
    assert "squeezenet1_1-b8a52dc0.pth is not in" in battery.unavailable["lpips_background_pie"]
    reason = "nobody/nothing is not in the hub's cache: unset HF_HUB_OFFLINE, or give a folder with --dino"
    assert battery.unavailable["dino"] == battery.unavailable["structure"] == reason
    assert str(tmp_path) in battery.unavailable["clip_i"]
    assert "install the extra" in battery.unavailable["identity"]
    assert "there is no file" in battery.unavailable["fid"]
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    for file, reason in (("bad.pt2", "cannot be loaded"), ("weights.pth", "there is no file")):
        assert reason in load_battery(["fid"], Places(fid=tmp_path / file)).unavailable["fid"]
    with pytest.raises(InputError, match="there is no metric 'beauty'"):
        load_battery(["beauty"], empty)


def test_a_default_that_is_not_in_the_cache_says_how_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match=r"not in the hub's cache: name the metric in --metrics, or give .* --clip$"):
        Clip(Places())


def test_features_of_sources_and_targets_serve_every_method(places):
    seen = []
    family = Fid(places)
    family.network.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for method in ("steps_1", "steps_4"):
        for row in range(4):
            family.add(replace(example(noise(row), noise(row + 9), id=str(row)), method=method))
    assert len(seen) == 4 + 2 * 4
    assert family.result("steps_1") == family.result("steps_4")


def test_perceptual_distances_are_torchmetrics_own(places):
    """Its function takes values from -1 to 1 for LPIPS, and from 0 to 1 for DISTS."""
    one, target = noise(11), 0.5 * noise(12)
    both = one[None], target[None]
    signed = tuple(2 * each - 1 for each in both)
    with places.hub_checkpoint("alexnet-owt-7be5be79.pth"):
        lpips = learned_perceptual_image_patch_similarity(*signed, net_type="alex").item()
    with places.hub_checkpoint("vgg16-397923af.pth"):
        dists = deep_image_structure_and_texture_similarity(*both).item()
    assert Lpips(places)(example(one, target))["lpips"] == pytest.approx(lpips, rel=1e-4)
    assert Dists(places)(example(one, target))["dists"] == pytest.approx(dists, rel=1e-4)


def test_lpips_of_the_background_is_against_the_source(places):
    background = torch.zeros(64, 64, dtype=torch.bool)
    background[:, 32:] = True
    target, source = noise(13), noise(14)
    family = LpipsPie(places)
    assert family(example(source, target, source, background))["lpips_background_pie"] == pytest.approx(0, abs=1e-6)
    found = family(example(target, target, source, background))["lpips_background_pie"]
    signed = (2 * each[None] * background - 1 for each in (target, source))
    with places.hub_checkpoint("squeezenet1_1-b8a52dc0.pth"):
        expected = learned_perceptual_image_patch_similarity(*signed, net_type="squeeze").item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 1e-4


def test_only_the_background_can_drift():
    """A part may be moved at will; a background that moves around a part that stands still has drifted."""
    source = photograph(512)
    moved = Image.new("RGB", source.size)
    moved.paste(source, (3, 4))
    background = torch.zeros(512, 512, dtype=torch.bool)
    background[:205] = True  # the smaller part: the whole picture would tell the opposite
    part = Image.fromarray((~background).numpy())
    before = pixels(source)
    edited = pixels(Image.composite(moved, source, part))
    scores = Registration()(example(edited, source=before, background=background))
    assert scores["drift_shift"] == pytest.approx(0, abs=0.1)
    assert (scores["drifted"], scores["drift_unknown"]) == (0, 0)
    shaken = pixels(Image.composite(source, moved, part))
    scores = Registration()(example(shaken, source=before, background=background))
    assert scores["drift_shift"] == pytest.approx(5, abs=0.1)
    assert scores["drifted"] == 1


def test_a_choice_measures_that_and_psnr_alone(places):
    battery = load_battery(["mse", "clip_i"], places)
    assert battery(example(noise(0), noise(1))).keys() == {"psnr", "mse", "clip_i"}
    assert battery.unavailable == {}
