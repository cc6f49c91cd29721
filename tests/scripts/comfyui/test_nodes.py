"""The node pack against this project's own sampler, sizes and text, with ComfyUI's arithmetic around it."""

import ast
import importlib.util
import json
import re
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from data_prep.model import encoders, geometry
from data_prep.model.editions import PLUS
from data_prep.model.geometry import Size
from eval.qwen.samplers import BridgeSampler
from eval.qwen.samplers.sigmas import linear_sigmas
from losses.batch import Edit
from losses.randomness import PictureRandom
from scripts.comfyui import draw_example
from scripts.comfyui.header import read_settings
from scripts.comfyui.nodes import METHODS, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, StartNoise
from scripts.comfyui.sizes import Geometry, bucket_size, covered, stretched
from tests.adapters import write_adapter
from tests.children import run
from tests.commands import ROOT
from tests.pictures import picture
from tests.scripts.comfyui.comfy_sampling import Model, sample_custom_advanced

PACK = ROOT / "scripts/comfyui"
NODES = {name: each() for name, each in NODE_CLASS_MAPPINGS.items()}


def velocity(x, sigma):
    """Some function of both that is no constant."""
    return torch.sin(x * (1 + sigma)) + sigma * x.roll(1, -1)


def start(model, latent, **more):
    return NODES["BridgeStart"].start(model, latent, **more)[0]


def sigmas(steps):
    return NODES["BridgeSigmas"].sigmas(steps)[0]


@pytest.fixture
def latent():
    """As ComfyUI's VAEEncode gives it for Qwen-Image: one frame."""
    return {"samples": torch.randn(1, 16, 1, 6, 8, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def loras(monkeypatch, tmp_path):
    """ComfyUI's module that finds files."""
    module = ModuleType("folder_paths")
    module.get_filename_list = lambda kind: sorted(path.name for path in tmp_path.glob("*.safetensors"))
    module.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return tmp_path


def saved(path: Path, keys=("diffusion_model.img_in.lora_A.weight",), **metadata) -> Path:
    save_file({key: torch.zeros(1) for key in keys}, path, metadata=metadata)
    return path


GEOMETRY = json.dumps(asdict(geometry.Geometry(max_pixels=64 * 64, vision_pixels=96 * 96)))


def test_an_adapter_of_the_first_edition_is_refused(tmp_path):
    header = {"objective": "lbm", "geometry": GEOMETRY}
    read_settings(saved(tmp_path / "plus.safetensors", **header, base_pipeline="QwenImageEditPlusPipeline"), "plus")
    first = saved(tmp_path / "first.safetensors", **header, base_pipeline="QwenImageEditPipeline")
    with pytest.raises(ValueError, match="first was trained on the first Qwen-Image-Edit"):
        read_settings(first, "first")


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_bridge_is_sampled_as_by_this_project(latent, steps):
    """Float32 on both sides, in another order: a few of its last bits."""
    model = Model(velocity)
    made = sample_custom_advanced(start(model, latent), model, sigmas(steps), latent)
    wan = model.get_model_object("latent_format")
    source = wan.process_in(latent["samples"])
    ours = BridgeSampler()(
        lambda x, sigma, _: velocity(x, float(sigma[0])),
        Edit(source, None, None, None, ["edit"]),
        steps,
        PictureRandom([0]),
    )
    torch.testing.assert_close(made, wan.process_out(ours), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.seen[0].x, source)  # nothing of noise, bit for bit
    assert [each.sigma for each in model.seen] == pytest.approx(linear_sigmas(steps)[:-1], abs=1e-7)


def test_nothing_is_drawn_and_the_start_is_not_changed(latent):
    model, before = Model(velocity), latent["samples"].clone()
    noise, state = start(model, latent), torch.get_rng_state()
    first = noise.generate_noise(latent)
    kept = first.clone()
    first += 1
    assert torch.equal(kept, noise.generate_noise(latent))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, latent["samples"])


def test_white_may_be_the_start_and_the_source_what_is_kept(latent):
    """The sub stream's start; a mask keeps the source where it is 0, whatever the start."""
    model, white = Model(velocity), {"samples": torch.full((1, 16, 1, 6, 8), 0.7)}
    wan = model.get_model_object("latent_format")
    mask = torch.zeros(1, 1, 1, 6, 8)
    mask[..., :4] = 1
    made = sample_custom_advanced(start(model, white), model, sigmas(2), latent, mask)
    assert torch.equal(model.seen[0].x, wan.process_in(white["samples"]))
    torch.testing.assert_close(made[..., 4:], latent["samples"][..., 4:], rtol=1e-5, atol=1e-5)
    assert (made[..., :4] - latent["samples"][..., :4]).abs().max() > 0.1


def test_a_noise_scale_of_the_model_is_taken_out(latent):
    model = Model(velocity, noise_scale=2.5)
    sample_custom_advanced(start(model, latent), model, sigmas(1), latent)
    torch.testing.assert_close(model.seen[0].x, model.get_model_object("process_latent_in")(latent["samples"]))


def test_latents_without_a_frame_and_of_a_batch(latent):
    model = Model(velocity)
    flat = {"samples": latent["samples"][:, :, 0]}
    assert torch.equal(start(model, flat).generate_noise(latent), start(model, latent).generate_noise(latent))
    several = {"samples": latent["samples"].repeat(3, 1, 1, 1, 1)}
    assert start(model, latent).generate_noise(several).shape == several["samples"].shape
    with pytest.raises(ValueError, match="give the same latent to both nodes"):
        start(model, latent).generate_noise({"samples": torch.zeros(1, 16, 1, 6, 9)})


def test_an_adapter_of_flow_matching_has_no_start(latent, tmp_path):
    path = saved(tmp_path / "flow.safetensors", objective="flow", geometry=GEOMETRY)
    with pytest.raises(ValueError, match="objective flow, not as a bridge"):
        start(Model(velocity), latent, settings=read_settings(path, "flow"))
    bridge = read_settings(saved(tmp_path / "lbm.safetensors", objective="lbm", geometry=GEOMETRY), "lbm")
    assert isinstance(start(Model(velocity), latent, settings=bridge), StartNoise)


@settings(max_examples=200)
@given(*[st.integers(16, 3000)] * 2, st.integers(32 * 32, 2**21), st.one_of(st.none(), st.integers(32 * 32, 2**21)))
def test_sizes_are_this_project_s(height, width, max_pixels, reference_pixels):
    ours = geometry.Geometry(max_pixels, 300 * 300, reference_pixels)
    pack, size = Geometry(max_pixels, 300 * 300, reference_pixels), Size(height, width)
    assert bucket_size(size, max_pixels) == geometry.bucket_size(size, max_pixels)
    target = ours.target_size(size)
    assert pack.result_size(size) == target
    assert pack.source_size(size) == ours.reference_sizes([size], size, 0)[0]
    assert pack.reference_size(size) == ours.reference_size(size)
    assert pack.vision_size(size) == ours.vision_size(size)


def image_of(values):
    return Image.fromarray((255 * values[0].numpy()).round().astype(np.uint8))


def as_image(photograph: Image.Image) -> torch.Tensor:
    """As ComfyUI's LoadImage gives it."""
    return torch.from_numpy(np.array(photograph.convert("RGB"), dtype=np.float32) / 255.0)[None]


def test_pictures_are_resized_as_by_this_project():
    photograph, size = picture(3, (90, 70)), Size(64, 96)
    assert image_of(covered(as_image(photograph), size)).tobytes() == geometry.fit(photograph, size).tobytes()
    assert image_of(stretched(as_image(photograph), size)).tobytes() == geometry.stretch(photograph, size).tobytes()


class Clip:
    """A CLIP: what it is given to tokenize."""

    def tokenize(self, text, images=(), llama_template=None):
        self.given = text, images, llama_template
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.zeros(1, 2, 3), {"pooled_output": None}]]


class Vae:
    """A VAE: the mean of each of its cells."""

    def encode(self, pixels):
        assert pixels.shape[-1] == 3
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_instruction_has_its_pictures_and_the_model_its_references(tmp_path, method):
    bridge = read_settings(saved(tmp_path / "lbm.safetensors", objective="lbm", geometry=GEOMETRY), "lbm")
    photographs = [picture(1, (128, 96)), picture(2, (50, 50))]
    source, references, width, height = NODES["BridgeFit"].fit(bridge, *map(as_image, photographs))
    ours = geometry.Geometry(**json.loads(GEOMETRY))
    target = ours.target_size(Size.of(photographs[0]))
    assert (height, width) == target == tuple(source.shape[1:3])
    assert image_of(source).tobytes() == geometry.fit(photographs[0], target).tobytes()
    clip = Clip()
    ((conditioning,),) = NODES["BridgeEncode"].encode(clip, Vae(), references, "Sharpen it.", method)
    text, images, template = clip.given
    expected = "".join(PLUS.picture.format(number) for number in (1, 2)) + "Sharpen it."
    assert template.format(text) == encoders.TEMPLATE.format(encoders.SYSTEM, expected)
    assert [image_of(each).size[::-1] for each in images] == [ours.vision_size(Size.of(each)) for each in photographs]
    sizes = ours.reference_sizes([Size.of(each) for each in photographs], Size.of(photographs[0]), 0)
    assert [Size(*each.shape[-2:]) for each in conditioning[1]["reference_latents"]] == [each.latent for each in sizes]
    assert conditioning[1].get("reference_latents_method", METHODS[0]) == method
    assert "pooled_output" in conditioning[1]


def test_the_header_is_read_and_said_in_words(loras):
    more = {"sigmas": "[1.0, 0.5]", "base_model": "Qwen/Qwen-Image-Edit-2511"}
    more |= {"extra_modules": "{}", "frozen": json.dumps({"0123": "style/step-000100"})}
    keys = [f"diffusion_model.{name}.lora_{kind}.weight" for name in ("img_in", "proj_out") for kind in "AB"]
    saved(loras / "mine.safetensors", keys, objective="lbm", geometry=GEOMETRY, **more)
    assert NODE_CLASS_MAPPINGS["BridgeSettings"].INPUT_TYPES()["required"]["lora_name"] == (["mine.safetensors"],)
    found, text = NODES["BridgeSettings"].read("mine.safetensors")
    assert (found.objective, found.sigmas, found.geometry) == ("lbm", (1.0, 0.5), Geometry(4096, 9216))
    for words in (
        "LoRA of 2 modules",
        "Qwen-Image-Edit-2511",
        "ComfyUI cannot load",
        "style/step-000100: load that",
        "9,216",
    ):
        assert words in text
    keys = [f"diffusion_model.img_in.{each}" for each in ("lokr_w1", "lokr_w2_a", "alpha")]
    saved(loras / "lokr.safetensors", keys, objective="lbm", geometry=GEOMETRY)
    assert "LoKr of 1 modules" in NODES["BridgeSettings"].read("lokr.safetensors")[1]
    saved(loras / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not say how it was trained"):
        NODES["BridgeSettings"].read("other.safetensors")
    saved(loras / "newer.safetensors", objective="lbm", geometry='{"max_pixels": 4096, "depth": 3}')
    with pytest.raises(ValueError, match="newer version, with depth: update these nodes"):
        NODES["BridgeSettings"].read("newer.safetensors")


def test_the_header_of_an_exported_adapter_is_read(tiny_model_dir, tmp_path):
    small = geometry.Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)
    folder = write_adapter(tmp_path / "made", tiny_model_dir, "lbm", small, sigmas=[1.0, 0.75])
    found = read_settings(folder / "adapter_model.safetensors", "made")
    assert (found.objective, asdict(found.geometry), found.sigmas) == ("lbm", asdict(small), (1.0, 0.75))


def test_the_example_is_drawn_anew_to_the_same_and_its_slots_are_the_nodes(tmp_path, loras):
    draw_example.write(tmp_path / "new")
    folder = PACK / "example_workflows"
    assert (tmp_path / "new/bridge_edit.json").read_text() == (folder / "bridge_edit.json").read_text()
    flow = json.loads((folder / "bridge_edit.json").read_text())
    with Image.open(folder / "bridge_edit.png") as image:
        assert json.loads(image.text["workflow"]) == flow
    nodes = {node["id"]: node for node in flow["nodes"]}
    for number, origin, out, to, into, kind in flow["links"]:
        source, target = nodes[origin]["outputs"][out], nodes[to]["inputs"][into]
        assert (source["type"], target["type"], target["link"]) == (kind, kind, number)
        assert number in source["links"]
        assert nodes[origin]["order"] < nodes[to]["order"]
    ours = [node for node in flow["nodes"] if node["type"] in NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in ours} == set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in ours:
        kind = NODE_CLASS_MAPPINGS[node["type"]]
        asked = {name: each[0] for group in kind.INPUT_TYPES().values() for name, each in group.items()}
        slots = {name: each for name, each in asked.items() if isinstance(each, str) and each not in ("STRING", "INT")}
        assert [(each["name"], each["type"]) for each in node["inputs"]] == list(slots.items())
        assert [each["type"] for each in node["outputs"]] == list(kind.RETURN_TYPES)
        assert len(node["widgets_values"]) == len(asked) - len(slots)
        assert callable(getattr(kind, kind.FUNCTION))


def test_the_documented_commands_put_it_where_comfyui_finds_it(tmp_path, loras):
    """And ComfyUI imports it from there, as a package under a name of its own (nodes.py, `load_custom_node`)."""
    section = (
        (ROOT / "docs/use_elsewhere.md").read_text(encoding="utf-8").partition("## ComfyUI")[2].partition("\n## ")[0]
    )
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    for folder in ("ComfyUI/custom_nodes", "ComfyUI/models/loras", "runs/mine/checkpoints/step-001000", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    saved(tmp_path / "runs/mine/checkpoints/step-001000/adapter_model.safetensors", objective="lbm", geometry=GEOMETRY)
    (tmp_path / "scripts/comfyui").symlink_to(PACK)
    done = run(["bash", "-ec", commands.replace("cp -r", "cp -rL")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ComfyUI/models/loras/mine.safetensors").is_file()
    name = "custom_nodes_latent-bridge-edit"
    file = tmp_path / "ComfyUI/custom_nodes/latent-bridge-edit/__init__.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        assert module.NODE_CLASS_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys()
        assert sys.modules[f"{name}.nodes"].__file__.startswith(str(tmp_path))
    finally:
        for each in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[each]


def test_the_pack_stands_alone_and_the_registry_can_take_it():
    assert {path.name for path in PACK.iterdir()} >= {"README.md", "pyproject.toml", "__init__.py"}
    imported = set()
    for path in PACK.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names <= {"torch", "numpy", "PIL", "safetensors", "folder_paths"}
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    name = project["project"]["name"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9]|[-_.](?![-_.]))*", name)
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert {"PublisherId", "DisplayName"} <= project["tool"]["comfy"].keys()
    assert project["project"]["license"] == {"text": "Apache-2.0"}
