"""Other base models behind the same request: tiny random pipelines in the library's own layout, opened as users do."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from data_prep.model.directory import COMPONENTS
from data_prep.model.geometry import Geometry, Size
from eval.bases.abilities import BASES
from eval.bases.auto import base_of, open_editor
from eval.request.base import BaseEditor
from eval.request.knobs import AdapterUse, Focus
from eval.request.placement import Placement
from eval.request.request import EditRequest
from eval.request.sizes import SizeLimits
from tests.pictures import picture
from tests.tiny_pipelines import WRITERS, write_sd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' Euler scheduler
]

CPU = torch.device("cpu")
EXACT = Placement(CPU, torch.float32)
SOURCE = picture(0, (64, 64))
MODES = {"sd15": "img2img", "sdxl": "img2img", "flux-kontext": "edit"}
SD15_BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
SDXL_BLOCK = "unet.up_blocks.0.attentions.1.transformer_blocks.0"
LORA_MODULES = {
    "sd15": [f"{SD15_BLOCK}.attn1.to_q", f"{SD15_BLOCK}.ff.net.2"],
    "sdxl": [f"{SDXL_BLOCK}.attn2.to_v", f"{SDXL_BLOCK}.ff.net.2"],
    "flux-kontext": ["transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.proj_out"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each kind, by its base's name."""
    parent = tmp_path_factory.mktemp("pipelines")
    found = {name: write(parent / name) for name, write in WRITERS.items()}
    return found | {"sd15-inpaint": write_sd(parent / "sd15-inpaint", None, inpainting=True)}


@pytest.fixture(scope="module")
def editors(folders) -> dict[str, BaseEditor]:
    return {name: open_editor(str(folder), EXACT) for name, folder in folders.items()}


def request(base: str, **changes: Any) -> EditRequest:
    """An edit that the base can make, in few steps."""
    return replace(EditRequest("a red fox", [SOURCE], MODES[base], steps=3, seed=7), **changes)


def edit(editor: BaseEditor, wanted: EditRequest) -> np.ndarray:
    return pixels(editor.edit(wanted)[0].image)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def square_mask(left: int = 16, right: int = 48) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (left, 16, right, 48))
    return mask


def index_only(folder: Path, name: str) -> Path:
    """A model of which nothing but its index can be read."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def write_lora(file: Path, folder: Path, modules: list[str], seed: int = 0, **metadata: str) -> Path:
    """A LoRA of rank 2, in PEFT's form, for linear modules of a saved pipeline."""
    generator = torch.Generator().manual_seed(seed)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    tensors = {}
    for module in modules:
        out_features, in_features = (
            pipeline.components[module.split(".")[0]].get_submodule(module.split(".", 1)[1]).weight.shape[:2]
        )
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, in_features, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out_features, 2, generator=generator)
    save_file(tensors, file, metadata={"format": "pt", **metadata})
    return file


@pytest.mark.parametrize("base", MODES)
def test_a_seed_gives_its_picture_for_any_count_and_order(editors, base):
    results = editors[base].edit(request(base, count=3))
    assert [each.seed for each in results] == [7, 8, 9]
    made = [pixels(each.image) for each in results]
    assert np.array_equal(edit(editors[base], request(base, seed=9)), made[2])
    assert np.array_equal(edit(editors[base], request(base, seed=7)), made[0])
    assert all((made[a] != made[b]).mean() > 0.5 for a, b in [(0, 1), (0, 2), (1, 2)])
    assert not np.array_equal(edit(editors[base], request(base, prompt="a blue cat")), made[0])


@pytest.mark.parametrize("base", MODES)
def test_the_settings_say_how_it_was_made(editors, folders, base):
    result = editors[base].edit(request(base, negative_prompt="blur", cfg_scale=2.0))[0]
    settings = json.loads(json.dumps(result.settings))
    expected = {"base": base, "model": str(folders[base]), "adapters": [], "mode": MODES[base], "prompt": "a red fox"}
    expected |= {"negative_prompt": "blur", "seed": 7, "steps": 3, "width": 64, "height": 64, "dtype": "float32"}
    assert settings.items() >= expected.items()
    assert settings["notice"] == "edited by a generative model"
    assert settings["sampler"]["cfg_scale"] == 2.0
    scheduler = {"sd15": "PNDMScheduler", "sdxl": "EulerDiscreteScheduler"}
    assert settings["sampler"]["name"] == scheduler.get(base, "FlowMatchEulerDiscreteScheduler")
    assert len(settings["model_fingerprint"]) == 32
    assert result.seconds > 0


def direct(base: str, folder: Path, **changes: Any) -> np.ndarray:
    """What diffusers makes of `request(base)`, called by hand, with its defaults for what is not named."""
    common: dict[str, Any] = {"prompt": "a red fox", "image": SOURCE, "num_inference_steps": 3}
    if base == "flux-kontext":
        pipeline: Any = FluxKontextPipeline.from_pretrained(folder)
        own = {"height": 64, "width": 64, "max_area": 64 * 64, "guidance_scale": 2.5, "_auto_resize": False}
    elif base == "sdxl":
        pipeline, own = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder), {"strength": 0.6}
    else:
        pipeline, own = StableDiffusionImg2ImgPipeline.from_pretrained(folder), {"strength": 0.6}
    return call(pipeline, **common | own | changes)


def call(pipeline: Any, **arguments: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pixels(pipeline(**arguments, generator=torch.Generator().manual_seed(7)).images[0])


@pytest.mark.parametrize("base", MODES)
def test_it_is_the_picture_that_diffusers_makes(editors, folders, base):
    assert np.array_equal(edit(editors[base], request(base)), direct(base, folders[base]))
    guidance = {"true_cfg_scale" if base == "flux-kontext" else "guidance_scale": 3.0}
    guided = direct(base, folders[base], negative_prompt="blur", **guidance)
    assert np.array_equal(edit(editors[base], request(base, negative_prompt="blur", cfg_scale=3.0)), guided)


def test_a_variation_is_unguided_and_needs_no_words(editors, folders):
    made = edit(editors["sd15"], request("sd15", mode="variation", prompt="", strength=0.9))
    assert np.array_equal(made, direct("sd15", folders["sd15"], prompt="", guidance_scale=1.0, strength=0.9))


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sd15-inpaint"])
def test_what_a_mask_keeps_is_kept_exactly(editors, base):
    source = picture(3, (70, 66))
    mask = square_mask().resize(source.size)
    wanted = EditRequest("a red fox", [source], "inpaint", mask=mask, feather=4, steps=3)
    made, kept = edit(editors[base], wanted), pixels(source)  # at its own size, of 60 x 64 that is made
    assert made.shape == kept.shape == (66, 70, 3)
    differs = (made != kept).any(axis=2)
    assert not differs[:14].any()
    assert not differs[:, 56:].any()
    assert differs[24:40, 24:40].mean() > 0.9
    focused = EditRequest("a red fox", [source], "focus", focus=Focus(0.25, 0.5, 0.2), steps=3)
    differs = (edit(editors[base], focused) != kept).any(axis=2)
    assert differs[28:36, 12:20].mean() > 0.9
    assert not differs[:, 32:].any()


def test_a_model_made_for_masks_gives_what_diffusers_gives(editors, folders):
    mask = square_mask()
    made = edit(
        editors["sd15-inpaint"], EditRequest("a red fox", [SOURCE], "inpaint", mask=mask, feather=0, steps=3, seed=7)
    )
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folders["sd15-inpaint"])
    whole = call(
        pipeline, prompt="a red fox", image=SOURCE, mask_image=mask, height=64, width=64, num_inference_steps=3
    )
    inside = np.asarray(mask)[..., None] == 255
    assert np.array_equal(made, np.where(inside, whole, pixels(SOURCE)))


def test_a_mask_thinner_than_a_latent_cell_is_not_lost(editors):
    line = square_mask(21, 23)
    fox, cat = (
        edit(editors["sd15"], EditRequest(prompt, [SOURCE], "inpaint", mask=line, feather=0, steps=3))
        for prompt in ("a red fox", "a blue cat")
    )
    assert (fox[16:48, 21:23] != cat[16:48, 21:23]).any()


def test_a_soft_rim_is_blended_in_the_latents_too(editors):
    hard, soft = (
        edit(
            editors["sd15"], EditRequest("a red fox", [SOURCE], "inpaint", mask=square_mask(), feather=feather, steps=3)
        )
        for feather in (0, 16)
    )
    middle = np.s_[31:33, 31:33]  # where the soft mask is 255 as well, so that pixels alone would be the same
    assert not np.array_equal(hard[middle], soft[middle])


@pytest.mark.parametrize("base", MODES)
def test_sizes(folders, base):
    editor = open_editor(str(folders[base]), EXACT, Geometry(max_pixels=64 * 96))
    wide = request(base, images=[picture(1, (300, 200))], steps=2)
    assert editor.edit(wide)[0].image.size == (96, 64)
    assert editor.edit(replace(wide, aspect="1:1"))[0].image.size == (64, 64)
    assert editor.edit(replace(wide, size=Size(96, 32)))[0].image.size == (32, 96)


@pytest.mark.parametrize("base", MODES)
def test_half_precision(folders, base):
    editor = open_editor(str(folders[base]), Placement(CPU, torch.bfloat16))
    result = editor.edit(request(base))[0]
    assert result.settings["dtype"] == "bfloat16"
    assert abs(pixels(result.image) - direct(base, folders[base])).mean() < 12


def test_a_mode_with_another_pipeline_keeps_the_numbers(folders):
    editor = open_editor(str(folders["sd15"]), Placement(CPU, torch.bfloat16))
    before = edit(editor, request("sd15"))
    edit(editor, request("sd15", mode="inpaint", mask=square_mask()))
    assert editor._pipeline.unet.dtype == torch.bfloat16  # diffusers' from_pipe turns to float32 unless told otherwise
    assert np.array_equal(edit(editor, request("sd15")), before)


REFUSED: list[tuple[str, Callable[[], EditRequest], str]] = [
    (
        "FluxKontextPipeline",
        lambda: request("sd15", mode="inpaint", mask=square_mask()),
        "flux-kontext has no mode=inpaint",
    ),
    ("FluxKontextPipeline", lambda: request("flux-kontext", images=[SOURCE] * 2), "at most 1 image"),
    ("FluxKontextPipeline", lambda: request("flux-kontext", negative_prompt="blur"), "cfg_scale above 1"),
    ("FluxKontextPipeline", lambda: request("flux-kontext", sampler="lightning"), "no sampler=lightning"),
    ("StableDiffusionPipeline", lambda: request("flux-kontext"), "sd15 has no mode=edit; it has img2img, variation"),
    ("StableDiffusionPipeline", lambda: request("sd15", images=[SOURCE] * 3), "sd15 takes at most 1 image.*got 3"),
    ("StableDiffusionPipeline", lambda: request("sd15", strength=0.2), "less than one step"),
    ("StableDiffusionPipeline", lambda: request("sd15", adapters=[AdapterUse(Path("none"))]), "no adapter at none"),
    ("StableDiffusionXLImg2ImgPipeline", lambda: request("flux-kontext"), "sdxl has no mode=edit"),
    (
        "StableDiffusionInpaintPipeline",
        lambda: request("sd15"),
        "sd15-inpaint has no mode=img2img; it has inpaint, focus",
    ),
]


@pytest.mark.parametrize(("name", "wanted", "message"), REFUSED)
def test_what_a_base_cannot_do_is_said_before_anything_is_loaded(tmp_path, name, wanted, message):
    editor = open_editor(str(index_only(tmp_path / "model", name)), EXACT)
    for ask in (editor.check, editor.edit):
        with pytest.raises(InputError, match=message):
            ask(wanted())


def test_a_model_whose_weights_are_missing(tmp_path, folders):
    with pytest.raises(InputError, match=r"model cannot be loaded: "):
        open_editor(str(index_only(tmp_path / "model", "StableDiffusionPipeline")), EXACT).edit(request("sd15"))
    broken = shutil.copytree(folders["sdxl"], tmp_path / "broken")
    next((broken / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"broken cannot be loaded: .*unet"):
        open_editor(str(broken), EXACT).edit(request("sdxl"))


def test_weights_that_are_there_in_half_precision_alone(folders, tmp_path):
    saved = DiffusionPipeline.from_pretrained(folders["sdxl"], dtype=torch.float16)
    saved.save_pretrained(tmp_path / "half", variant="fp16")
    result = open_editor(str(tmp_path / "half"), EXACT).edit(request("sdxl"))[0]
    assert abs(pixels(result.image) - direct("sdxl", folders["sdxl"])).mean() < 2
    before = result.settings["model_fingerprint"]
    (tmp_path / "half" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "half" / "unet" / "older.weights").mkdir()  # diffusers trips over a name without a dot
    again = open_editor(str(tmp_path / "half"), EXACT).edit(request("sdxl"))[0]
    assert again.settings["model_fingerprint"] == before
    config = tmp_path / "half" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    changed = open_editor(str(tmp_path / "half"), EXACT).edit(request("sdxl"))[0]
    assert changed.settings["model_fingerprint"] != before


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(CPU, torch.float32, weights="int8"), "sd15 does not support weights=int8"),
        (Placement(CPU, torch.float32, offload="model"), "offload=model of sd15 needs a GPU"),
    ],
)
def test_a_placement_that_pipelines_do_not_have(folders, placement, message):
    with pytest.raises(InputError, match=message):
        open_editor(str(folders["sd15"]), placement)


def test_vae_tiling_is_for_what_does_not_fit_into_a_tile(editors, folders):
    tiled = open_editor(str(folders["sd15"]), Placement(CPU, torch.float32, vae_tiling=True))
    large = request("sd15", images=[picture(2, (128, 128))], steps=2)
    assert np.array_equal(edit(tiled, request("sd15")), edit(editors["sd15"], request("sd15")))
    assert not np.array_equal(edit(tiled, large), edit(editors["sd15"], large))  # the tiny VAE's tiles are 64 pixels


def test_which_base_a_folder_holds(tmp_path, folders, monkeypatch):
    assert {name: base_of(str(folder)) for name, folder in folders.items()} == {name: name for name in folders}
    with pytest.raises(
        InputError, match=r"is a StableCascadePipeline, .* those that can are QwenImageEditPipeline, .*XL"
    ):
        base_of(str(index_only(tmp_path / "other", "StableCascadePipeline")))
    (tmp_path / "other" / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index.json is not valid JSON"):
        base_of(str(tmp_path / "other"))
    (tmp_path / "other" / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"transformer, vae, text_encoder"):
        base_of(str(tmp_path / "other"))
    for name in COMPONENTS:
        (tmp_path / "other" / name).mkdir()
    assert base_of(str(tmp_path / "other")) == "qwen-image-edit"
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    editor = open_editor("other", EXACT)
    assert editor.folder == tmp_path / "other"
    assert (editor.abilities.base, editor.abilities.max_images) == ("qwen-image-edit", 3)


def test_a_hub_id_is_found_in_the_cache_and_refused_with_the_index_alone(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"no folder acme/tiny, and downloading it from the hub failed"):
        open_editor("acme/tiny", EXACT)
    cached = tmp_path / "models--acme--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    index_only(cached / "snapshots" / ("0" * 40), "StableDiffusionPipeline")
    with pytest.raises(InputError, match="sd15 has no mode=edit"):
        open_editor("acme/tiny", EXACT).edit(request("flux-kontext"))
    shutil.copytree(folders["sd15"], cached / "snapshots" / ("0" * 40), dirs_exist_ok=True)
    found = open_editor("acme/tiny", EXACT).edit(request("sd15"))[0]
    assert np.array_equal(pixels(found.image), direct("sd15", folders["sd15"]))


def test_a_request_is_checked_with_the_index_alone(tmp_path, monkeypatch):
    """Of Qwen-Image-Edit by its hub id; the model would have 58 GB."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--acme--qwen"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    index_only(cached / "snapshots" / ("0" * 40), "QwenImageEditPlusPipeline")
    editor = open_editor("acme/qwen", EXACT)
    editor.check(EditRequest("x", [SOURCE]))
    with pytest.raises(InputError, match="mode=turbo needs an adapter"):
        editor.check(EditRequest("x", [SOURCE], "turbo"))
    with pytest.raises(InputError, match="transformer, vae, text_encoder"):
        editor.edit(EditRequest("x", [SOURCE]))


def test_a_limit_leaves_the_other_sizes_of_a_base(folders):
    for base in ("sd15", "sdxl"):
        editor = open_editor(str(folders[base]), EXACT, limits=SizeLimits(vision_pixels=4096))
        assert editor.geometry == Geometry(BASES[base].geometry.max_pixels, 4096)


@pytest.mark.parametrize("base", MODES)
def test_adapters_add_what_their_matrices_say(folders, tmp_path, base):
    modules = LORA_MODULES[base]
    files = [write_lora(tmp_path / f"{seed}.safetensors", folders[base], modules, seed) for seed in (1, 2)]
    editor = open_editor(str(folders[base]), EXACT)
    plain = edit(editor, request(base))
    uses = [AdapterUse(files[0], 0.5), AdapterUse(files[1], -0.25)]
    result = editor.edit(request(base, adapters=uses))[0]
    assert [each["weight"] for each in result.settings["adapters"]] == [0.5, -0.25]
    merged = merge(folders[base], modules, {files[0]: 0.5, files[1]: -0.25}, tmp_path / "merged")
    by_hand = direct(base, merged)
    assert abs(pixels(result.image) - by_hand).max() <= 2
    assert abs(plain - by_hand).mean() > 1
    assert np.array_equal(edit(editor, request(base)), plain)
    assert np.array_equal(edit(editor, request(base, adapters=[AdapterUse(files[0], 0.0)])), plain)


def merge(folder: Path, modules: list[str], weights: dict[Path, float], out: Path) -> Path:
    """The model with weight · B·A added to its own matrices."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for file, weight in weights.items():
        tensors = load_file(file)
        for module in modules:
            part, name = module.split(".", 1)
            own = pipeline.components[part].get_submodule(name).weight
            added = weight * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            own.data += added.reshape(own.shape)
    pipeline.save_pretrained(out)
    return out


def test_an_adapter_of_another_base_is_refused(editors, folders, tmp_path):
    plain = edit(editors["sd15"], request("sd15"))
    qwen = {f"diffusion_model.transformer_blocks.0.attn.to_q.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    save_file(qwen, tmp_path / "ours.safetensors", metadata={"objective": "lbm"})
    save_file(qwen, tmp_path / "qwen.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "none.safetensors")
    write_lora(tmp_path / "xl.safetensors", folders["sdxl"], LORA_MODULES["sdxl"])
    flux = write_lora(tmp_path / "flux.safetensors", folders["flux-kontext"], LORA_MODULES["flux-kontext"])
    for base, name, message in [
        ("sd15", "ours", "ours.safetensors is an adapter for qwen-image-edit, but the base model is sd15"),
        ("sd15", "qwen", "qwen.safetensors is not an adapter for sd15: only 0 of its 1 modules"),
        ("flux-kontext", "qwen", "qwen.safetensors is not an adapter for flux-kontext"),
        ("sd15", "none", "none.safetensors is not a LoRA adapter"),
        ("sd15", "xl", "xl.safetensors is not an adapter for sd15"),
        ("sdxl", "flux", "flux.safetensors is not an adapter for sdxl: only 0 of its 2 modules"),
    ]:
        use = AdapterUse(tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            editors[base].edit(request(base, adapters=[use]))
    assert flux.is_file()
    assert np.array_equal(edit(editors["sd15"], request("sd15")), plain)


def test_an_adapter_in_kohyas_form(editors, folders, tmp_path):
    modules = LORA_MODULES["sd15"][:1]
    peft = write_lora(tmp_path / "peft.safetensors", folders["sd15"], modules)
    halves = {"lora_A": "lora_down", "lora_B": "lora_up"}
    kohya = {}
    for name, tensor in load_file(peft).items():
        module, half, _ = name.rsplit(".", 2)
        kohya[f"lora_{module.replace('.', '_')}.{halves[half]}.weight"] = tensor
        kohya[f"lora_{module.replace('.', '_')}.alpha"] = torch.tensor(2.0)  # = rank: the scale is 1
    save_file(kohya, tmp_path / "kohya.safetensors")
    one, other = (
        edit(editors["sd15"], request("sd15", adapters=[AdapterUse(tmp_path / f"{name}.safetensors")]))
        for name in ("peft", "kohya")
    )
    assert np.array_equal(one, other)


@pytest.mark.parametrize("base", MODES)
def test_progress_counts_every_step_and_ends_the_edit(editors, base):
    seen: list[tuple[int, int]] = []
    before = pixels(editors[base].edit(request(base, count=2), lambda *now: seen.append(now))[0].image)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    assert len(seen) % 2 == 0

    def cancel(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editors[base].edit(request(base), cancel)
    assert np.array_equal(edit(editors[base], request(base)), before)


def test_a_picture_that_the_safety_checker_blackens_is_reported(editors, tmp_path):
    assert editors["sd15"].edit(request("sd15"))[0].settings["flagged"] is False
    strict = open_editor(str(write_sd(tmp_path / "strict", checker_flags=True)), EXACT)
    result = strict.edit(request("sd15"))[0]
    assert result.settings["flagged"] is True
    assert not pixels(result.image).any()
    assert "flagged" not in editors["flux-kontext"].edit(request("flux-kontext"))[0].settings
