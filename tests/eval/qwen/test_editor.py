"""The editor on the tiny model: every mode, what decides a picture, and what is loaded when."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps
from safetensors.torch import load_file, save_file

from data_prep.cache.reader import CacheReader
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import VAE, PromptEncoder
from data_prep.model.geometry import Geometry, Size, fit, fit_mask
from data_prep.rows.images import open_image, open_mask
from data_prep.rows.rows import EMPTY_PROMPT
from eval.qwen.editor import Editor
from eval.qwen.encoding import RequestEncoder, join_edits
from eval.qwen.modes import choose_sampler
from eval.qwen.samplers import BridgeSampler, FlowSampler
from eval.request.knobs import AdapterUse, Control, Focus
from eval.request.metadata import DEFAULT_GEOMETRY, trained_geometry
from eval.request.placement import Placement
from eval.request.request import EditRequest
from tests.adapters import write_adapter
from tests.caching import GEOMETRY, cache_dataset, write_dataset, write_image, write_rows

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)
FLOAT = Placement(dtype=torch.float32)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, tiny_model_dir):
    return write_adapter(tmp_path_factory.mktemp("bridge"), tiny_model_dir, "lbm", SMALL, bridge_noise=0.005)


@pytest.fixture(scope="module")
def flow(tmp_path_factory, tiny_model_dir):
    return write_adapter(tmp_path_factory.mktemp("flow"), tiny_model_dir, "flow", SMALL)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture")
    return open_image(folder / write_image(folder / "photo.png", 3, 160, 100))


@pytest.fixture(scope="module")
def editor(tiny_model_dir):
    return Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT, SMALL)


def request(source: Image.Image, **values) -> EditRequest:
    return EditRequest(**({"prompt": "x", "images": [source], "steps": 2} | values))


def same(a: Image.Image, b: Image.Image) -> bool:
    return ImageChops.difference(a, b).getbbox() is None


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2)
    return float(10 * np.log10(255**2 / error))


def half_mask(source: Image.Image) -> Image.Image:
    """The right half may be edited."""
    mask = Image.new("L", source.size, 0)
    mask.paste(255, (source.width // 2, 0, *source.size))
    return mask


def test_it_encodes_as_the_cache_does(editor, tiny_model_dir, tmp_path):
    cache_dataset(write_dataset(tmp_path, write_rows(tmp_path, 3)), tmp_path / "cache", tiny_model_dir, negative=True)
    for record in CacheReader(tmp_path / "cache"):
        images = [open_image(path) for path in record.row["edit_image"]]
        with editor.components.encoders() as encoders:
            encoder = RequestEncoder(lambda encoders=encoders: encoders, GEOMETRY, torch.device("cpu"))
            size = GEOMETRY.target_size(Size.of(images[0]))
            negative = record.row["negative_prompt"] or EMPTY_PROMPT
            changed = ImageOps.invert(open_mask(back)) if (back := record.row["back_mask"]) else None
            changed = changed and fit_mask(changed, size)
            edit = encoder.encode(images, record.row["prompt"], negative, size, white=True, changed=changed).edit
        scene = edit.condition.scene
        assert scene is not None
        assert scene.source_latents is edit.source_latents
        assert scene.sub_noise is edit.sub_noise
        assert (scene.mask is None) == (record.mask is None)
        assert record.mask is None or torch.allclose(scene.mask[0], record.mask.float(), atol=1e-2)  # of bfloat16
        assert edit.sub_noise is not None
        assert torch.allclose(edit.source_latents[0], record.source_latents, atol=1e-5)
        assert torch.allclose(edit.sub_noise[0], record.sub_noise, atol=1e-5)
        assert torch.allclose(edit.condition.prompt_emb[0], record.prompt_emb, atol=1e-5)
        assert edit.negative is not None
        assert record.negative_prompt_emb is not None
        assert torch.allclose(edit.negative.prompt_emb[0], record.negative_prompt_emb, atol=1e-5)
        for latents, cached in zip(edit.condition.edit_latents, record.edit_latents, strict=True):
            assert torch.allclose(latents[0], cached, atol=1e-5)


def test_a_seed_gives_the_same_picture_for_any_count_and_order(editor, source):
    three = editor.edit(request(source, count=3, seed=5))
    assert [result.seed for result in three] == [5, 6, 7]
    assert not same(three[0].image, three[1].image)
    for seed in (7, 5):
        assert same(editor.edit(request(source, seed=seed))[0].image, three[seed - 5].image)
    assert all(result.settings["seed"] == result.seed for result in three)


@pytest.mark.parametrize("mode", ["edit", "inpaint", "invert", "focus"])
def test_pictures_made_together_are_those_made_alone(editor, source, mode):
    """Within two grey levels: a batch rounds its sums otherwise."""
    own = {"mode": mode} | ({"mask": half_mask(source)} if mode == "inpaint" else {})
    prompts = ["x", "make it a long way longer", "y z"]
    requests = [request(source, prompt=prompt, seed=seed, **own) for seed, prompt in enumerate(prompts)]
    assert len({editor.batch_key(each) for each in requests}) == 1
    together = editor.edit_together(requests)
    for each, (result,) in zip(requests, together, strict=True):
        alone = editor.edit(each)[0]
        assert difference(result.image, alone.image) <= 2
        assert result.settings == alone.settings


def test_what_cannot_go_together_has_another_key(editor, source, flow):
    key = editor.batch_key(request(source))
    assert key is not None
    others = [{"steps": 3}, {"size": Size(32, 32)}, {"cfg_scale": 1.0}, {"adapters": (AdapterUse(flow),)}]
    others += [{"mode": "focus"}, {"images": [source, source]}, {"mode": "invert"}]
    assert key not in {editor.batch_key(request(source, **each)) for each in others}
    assert editor.batch_key(request(source, count=2)) is None
    assert editor.batch_key(request(source, mode="control", controls=(Control("canny"),))) is None


def test_joined_instructions_are_padded_and_masked(editor, source):
    with editor.components.encoders() as encoders:
        encoder = RequestEncoder(lambda: encoders, SMALL, torch.device("cpu"))
        edits = [encoder.encode([source], prompt, " ", Size(32, 64)).edit for prompt in ("a", "a much longer one")]
    joined = join_edits(edits)
    lengths = [each.condition.prompt_emb.shape[1] for each in edits]
    assert joined.condition.prompt_emb_mask.sum(1).tolist() == lengths
    assert joined.negative is not None
    assert torch.equal(joined.source_latents, torch.cat([each.source_latents for each in edits]))
    assert joined.ids == ["edit", "edit"]


def test_prompt_adapters_and_weights_decide_the_picture(editor, source, bridge, flow):
    def edited(**values) -> Image.Image:
        return editor.edit(request(source, **values))[0].image

    plain = edited(cfg_scale=1.0)
    assert not same(plain, edited(prompt="something else", cfg_scale=1.0))
    assert not same(plain, edited(cfg_scale=4.0))
    assert same(plain, edited(adapters=(AdapterUse(flow, 0.0),), cfg_scale=1.0))
    assert not same(plain, edited(adapters=(AdapterUse(flow),), cfg_scale=1.0))
    bridged = edited(adapters=(AdapterUse(bridge),))
    assert same(bridged, edited(adapters=(AdapterUse(bridge),), seed=1))  # a deterministic bridge draws nothing
    stochastic = edited(adapters=(AdapterUse(bridge),), sampler="bridge-stochastic")
    assert not same(stochastic, bridged)
    white = edited(adapters=(AdapterUse(bridge),), sampler="bridge-white")
    assert not same(white, bridged)
    assert same(plain, edited(cfg_scale=1.0))  # nothing of the adapters is left behind


def test_a_picture_of_a_fused_adapter_is_that_of_one_beside_the_weights(tiny_model_dir, source, bridge):
    """In float32 within a grey level. In bfloat16, whose products are rounded either way, it is as near to float32's picture:
    measured 50.3 and 49.7 dB for a bridge in 4 steps, 48.1 and 48.3 for flow matching in 8."""

    def edited(dtype: torch.dtype, fused: bool) -> Image.Image:
        editor = Editor(ModelDirectory.resolve(tiny_model_dir), Placement(dtype=dtype), SMALL)
        with editor.components.denoiser():
            editor.components._fused = editor.components._fused if fused else None
        return editor.edit(request(source, adapters=(AdapterUse(bridge),), steps=4))[0].image

    plain = edited(torch.float32, fused=False)
    assert difference(edited(torch.float32, fused=True), plain) <= 1
    rounded = {fused: psnr(edited(torch.bfloat16, fused), plain) for fused in (True, False)}
    assert rounded[True] > max(44, rounded[False] - 2)


def test_adapters_of_two_objectives_are_refused(editor, source, bridge, flow, tmp_path):
    foreign = tmp_path / "lightning.safetensors"  # whose header says nothing
    save_file(load_file(flow / "adapter_model.safetensors"), foreign)
    for other in (flow, foreign):
        with pytest.raises(InputError, match="different objectives"):
            editor.check(request(source, adapters=(AdapterUse(bridge), AdapterUse(other))))
    alone = editor.prepare(request(source, adapters=(AdapterUse(bridge, 0.0), AdapterUse(flow))))
    assert alone.plan.name == "flow"  # a weight of 0 is as if it were not there


def test_a_switch_of_adapters_that_fails_is_known(editor, source, bridge, flow, monkeypatch):
    """As when memory runs out between taking one off and putting the other on."""

    def edited() -> Image.Image:
        return editor.edit(request(source, adapters=(AdapterUse(bridge),)))[0].image

    before = edited()
    with monkeypatch.context() as broken:
        broken.setattr("eval.qwen.weights.fusing.fused_weight", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            editor.edit(request(source, adapters=(AdapterUse(flow),)))
    assert same(edited(), before)


def test_a_request_is_refused_before_anything_is_loaded(tiny_model_dir, source, bridge):
    editor = Editor(ModelDirectory.resolve(tiny_model_dir))
    for wrong in ({"cfg_scale": 3.0, "adapters": (AdapterUse(bridge),)}, {"mode": "turbo"}):
        with pytest.raises(InputError):
            editor.edit(request(source, **wrong))
    with pytest.raises(InputError, match="the mask has 8x8 pixels"):
        editor.edit(request(source, mode="inpaint", mask=Image.new("L", (8, 8), 255)))
    rim = Image.new("L", source.size)
    rim.paste(255, (0, 0, 8, source.height))
    with pytest.raises(InputError, match="white at the picture's rim alone, which the size of the result cuts off"):
        editor.edit(request(source, mode="inpaint", mask=rim, size=Size(64, 64)))
    assert editor.components.loaded == set()


def test_preload_loads_what_the_first_edit_needs(tiny_model_dir, flow, monkeypatch):
    model = ModelDirectory.resolve(tiny_model_dir)
    editor = Editor(model, FLOAT, SMALL)
    editor.preload([AdapterUse(flow)])
    assert editor.components.loaded == {"vae", "prompt_encoder", "denoiser"}
    monkeypatch.setattr("eval.qwen.weights.components.read_file", None)  # the adapter is there too
    with editor.components.denoiser([AdapterUse(flow)]):
        pass
    with pytest.raises(InputError, match="--preload loads what --offload model on a CPU frees again"):
        Editor(model, Placement(offload="model"), SMALL).preload()


def test_img2img_stays_nearer_with_less_strength(editor, source):
    fitted = fit(source, Size(32, 51))
    values = {"mode": "img2img", "steps": 10, "cfg_scale": 1.0}
    images = [editor.edit(request(source, **values, strength=strength))[0].image for strength in (0.1, 0.5, 1.0)]
    distances = [psnr(image, fitted) for image in images]
    assert distances[0] > distances[1] > distances[2] - 0.5
    whole = editor.edit(request(source, mode="edit", steps=10, cfg_scale=1.0))[0].image
    assert same(images[2], whole)


def test_no_instruction_is_a_space_wherever_one_is_needed(editor, source, monkeypatch):
    """As it was in training: for a variation, as the empty condition of an inversion, and as what guidance leads away from."""
    seen = []
    encode = RequestEncoder._condition
    monkeypatch.setattr(
        RequestEncoder, "_condition", lambda self, prompt, *rest: seen.append(prompt) or encode(self, prompt, *rest)
    )
    for values in ({"mode": "variation", "prompt": "", "steps": 2}, {"mode": "invert"}, {"negative_prompt": ""}):
        editor.edit(request(source, **values))
    assert set(seen) == {"x", " "}
    assert seen.count(" ") == 5  # the variation's two, the inversion's two, and the edit's one


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """What the encoders are given, in order."""
    seen = []
    embed, encode = PromptEncoder.encode, VAE.encode
    monkeypatch.setattr(
        PromptEncoder, "encode", lambda self, prompt, images: seen.append(prompt) or embed(self, prompt, images)
    )

    def watched(self, pixels):
        seen.append("white" if bool((pixels == 1).all()) else "image")
        return encode(self, pixels)

    monkeypatch.setattr(VAE, "encode", watched)
    return seen


def test_what_was_encoded_is_not_encoded_again(tiny_model_dir, source, encoded):
    """The next seed, another guidance and the same picture from another file cost nothing; other contents are encoded."""
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT, SMALL)
    first = editor.edit(request(source, seed=1))[0]
    assert encoded == ["image", "x", " "]
    for values in ({"seed": 2}, {"cfg_scale": 1.0}, {"images": [source.copy()], "steps": 3}, {"mode": "invert"}):
        editor.edit(request(source, **values))
    assert same(editor.edit(request(source, seed=1))[0].image, first.image)
    assert encoded == ["image", "x", " "]
    changed = source.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    for values, new in [
        ({"prompt": "y"}, ["y"]),
        ({"size": Size(64, 96)}, ["image", "image"]),  # cropped to it, and to its own size as a reference
        ({"images": [changed]}, ["image", "x", " "]),
        ({"images": [source, changed]}, ["image", "x", " "]),  # a reference is cropped, where the source is shown whole
        ({"images": [source, changed, source]}, ["x", " "]),
        (
            {"images": [source, source, changed]},
            ["x", " "],
        ),  # all pictures are known, together they are another instruction
    ]:
        encoded.clear()
        editor.edit(request(source, **values))
        assert encoded == new
    editor.components.free()
    encoded.clear()
    editor.edit(request(source, seed=3))
    assert "prompt_encoder" not in editor.components.loaded  # nothing was to be encoded
    editor.forget()
    editor.edit(request(source, seed=3))
    assert encoded == ["image", "x", " "]


def test_white_is_encoded_where_a_bridge_starts_there_once_a_size(tiny_model_dir, source, bridge, encoded):
    editor = Editor(ModelDirectory.resolve(tiny_model_dir), FLOAT, SMALL)
    use = {"adapters": (AdapterUse(bridge),)}
    editor.edit(request(source, **use))
    assert "white" not in encoded
    for prompt in ("x", "y"):
        editor.edit(request(source, **use, sampler="bridge-white", prompt=prompt))
    assert encoded.count("white") == 1
    editor.edit(request(source, **use, sampler="bridge-white", size=Size(64, 96)))
    assert encoded.count("white") == 2


def test_steps_that_were_not_trained_are_noted_before_anything_is_loaded(editor, source, bridge, tmp_path):
    assert editor.notes(request(source, steps=3, adapters=(AdapterUse(bridge),))) == ()  # it does not say
    tensors, file = load_file(bridge / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors"
    save_file(tensors, file, {"objective": "lbm", "loss": "{}", "sigmas": "[1.0, 0.5]"})
    (note,) = editor.notes(request(source, steps=4, adapters=(AdapterUse(file),)))
    assert note == "the adapter was trained at sigma 1, 0.5, but 4 steps also visit 0.75, 0.25; 1 or 2 steps would not"


def test_variation_takes_no_instruction(editor, source):
    results = editor.edit(request(source, mode="variation", prompt="", count=2, steps=4))
    assert not same(results[0].image, results[1].image)
    assert results[0].settings["sampler"]["strength"] == 0.6
    empty = editor.edit(request(source, mode="img2img", prompt=".", steps=4))[0]
    assert not same(empty.image, results[0].image)


@pytest.mark.parametrize("with_bridge", [False, True])
def test_inpaint_keeps_every_pixel_that_the_mask_keeps(editor, source, bridge, with_bridge):
    own = {"adapters": (AdapterUse(bridge),)} if with_bridge else {"steps": 4}
    result = editor.edit(request(source, mode="inpaint", mask=half_mask(source), size=Size(64, 96), **own))[0]
    fitted = fit(source, Size(64, 96))
    before, after = np.asarray(fitted).astype(int), np.asarray(result.image).astype(int)
    assert (before[:, :48] == after[:, :48]).all()
    assert np.abs(before - after)[:, 60:].mean() > 1
    assert result.settings["mask_digest"]
    assert result.settings["feather"] == 8


@pytest.mark.parametrize("mode", ["inpaint", "focus"])
def test_without_a_size_the_first_image_comes_back_at_its_own(editor, source, mode):
    """Made at another size, and put in its place: what the mask keeps is the image's own, the rest is changed."""
    odd = source.resize((161, 99))
    own = {"mask": half_mask(odd)} if mode == "inpaint" else {"focus": Focus(0.75, 0.5, 0.4)}
    result = editor.edit(request(odd, mode=mode, **own))[0]
    assert result.image.size == odd.size
    assert (result.settings["width"], result.settings["original_size"]) == (161, True)
    changed = np.abs(np.asarray(result.image).astype(int) - np.asarray(odd)).max(2)
    assert (changed[:, :80] == 0).all()
    assert changed[20:80, 100:140].mean() > 1


def test_sampling_inside_a_mask_sees_what_is_kept(editor, source):
    """Blended at every step: what is made inside is another picture than without the mask, and not a cut of it."""
    plain = editor.edit(request(source, steps=4, size=Size(64, 96)))[0].image
    inpainted = editor.edit(
        request(source, steps=4, size=Size(64, 96), mode="inpaint", mask=half_mask(source), feather=0)
    )[0].image
    assert difference(plain.crop((56, 0, 96, 64)), inpainted.crop((56, 0, 96, 64))) > 2


def test_focus_changes_a_disc(editor, source):
    focus = Focus(x=0.25, y=0.5, radius=0.3)
    result = editor.edit(request(source, mode="focus", focus=focus, size=Size(64, 96)))[0]
    changed = np.abs(np.asarray(result.image).astype(int) - np.asarray(fit(source, Size(64, 96)))).max(2)
    rows, columns = np.mgrid[:64, :96] + 0.5
    distance = np.hypot(columns - 24, rows - 32)
    assert changed[distance > 0.3 * 64].max() == 0
    assert changed[distance < 0.15 * 64].mean() > 1
    assert result.settings["focus"] == {"x": 0.25, "y": 0.5, "radius": 0.3}


def test_a_control_map_is_a_further_reference(editor, source):
    def edited(*controls: Control):
        return editor.edit(request(source, mode="control", controls=controls, cfg_scale=2.0))[0]

    whole = edited(Control("canny"))
    assert whole.maps[0].size == fit(source, Size(32, 64)).size
    as_reference = editor.edit(request(source, images=[source, whole.maps[0]], cfg_scale=2.0))[0]
    assert same(whole.image, as_reference.image)
    without = editor.edit(request(source, cfg_scale=2.0))[0]
    assert difference(edited(Control("canny", 0.0)).image, without.image) <= 1
    half = edited(Control("canny", 0.5), Control("lines"))
    assert not same(half.image, whole.image)
    assert half.settings["controls"] == [
        {"kind": "canny", "strength": 0.5},
        {"kind": "lines", "strength": 1.0},
    ]


def test_control_inpaint_has_both(editor, source):
    values = {"mode": "control-inpaint", "controls": (Control("canny"),), "mask": half_mask(source)}
    result = editor.edit(request(source, size=Size(64, 96), **values))[0]
    kept = np.asarray(result.image)[:, :48] == np.asarray(fit(source, Size(64, 96)))[:, :48]
    assert kept.all()
    assert len(result.maps) == 1


def test_invert_edits_more_with_more_strength_and_draws_nothing(editor, source):
    values = {"mode": "invert", "steps": 8, "cfg_scale": 1.0}
    edited = editor.edit(request(source, **values, prompt="make it blue", strength=0.5))[0]
    more = editor.edit(request(source, **values, prompt="make it blue", strength=1.0))[0]
    fitted = fit(source, Size(32, 51))
    assert psnr(edited.image, fitted) > psnr(more.image, fitted)
    assert same(
        edited.image, editor.edit(request(source, **values, prompt="make it blue", strength=0.5, seed=9))[0].image
    )


def test_turbo_is_four_steps_without_guidance(editor, source, flow, bridge):
    result = editor.edit(request(source, mode="turbo", steps=None, adapters=(AdapterUse(flow),)))[0]
    assert result.settings["steps"] == 4
    assert result.settings["sampler"]["shift"] == "lightning"
    assert "negative_prompt" not in result.settings
    bridged = editor.edit(request(source, mode="turbo", adapters=(AdapterUse(bridge),)))[0]
    assert bridged.settings["sampler"]["kind"] == "bridge"


def test_progress_counts_all_pictures_and_what_it_raises_ends_the_edit(editor, source):
    seen = []
    editor.edit(request(source, count=2, steps=3), lambda done, total: seen.append((done, total)))
    assert seen == [(step, 6) for step in range(1, 7)]

    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        editor.edit(request(source, count=2, steps=3), cancel)
    assert editor.edit(request(source))[0].image.size == (51, 32)


def test_settings_are_json_and_say_everything(editor, source, flow):
    result = editor.edit(request(source, adapters=(AdapterUse(flow, 0.5),), negative_prompt="blurry", aspect="1:1"))[0]
    settings = json.loads(json.dumps(result.settings))
    assert settings == result.settings
    assert settings["notice"] == "edited by a generative model"
    assert settings["adapters"][0]["weight"] == 0.5
    assert len(settings["adapters"][0]["digest"]) >= 32
    assert (settings["prompt"], settings["negative_prompt"], settings["steps"]) == ("x", "blurry", 2)
    assert settings["width"] == settings["height"]
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result.seconds > 0


def test_metadata_decides_the_sampler_of_an_evaluation():
    assert choose_sampler({}).sampler == FlowSampler(cfg_scale=4.0)
    assert choose_sampler({}, cfg_scale=1.0).sampler.guided is False
    drift = {"objective": "lbm", "loss": json.dumps({"prediction": "drift", "bridge_noise": 0.2, "sub_prob": 1})}
    assert choose_sampler(drift).sampler == BridgeSampler("white", bridge_noise=0.2, prediction="drift")
    assert choose_sampler({"objective": "lbm"}).steps == 4
    with pytest.raises(InputError, match="objective is 'gan'"):
        choose_sampler({"objective": "gan"})


def test_metadata_decides_the_sizes():
    assert trained_geometry({}) == DEFAULT_GEOMETRY
    text = json.dumps({"max_pixels": 4096, "vision_pixels": 3136, "reference_pixels": None})
    assert trained_geometry({"geometry": text}) == SMALL
