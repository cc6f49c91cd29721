"""What saves memory: each option against full weights, and what cannot be served refused before anything is loaded."""

import math
from argparse import Namespace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import load_vae
from eval.qwen.weights.components import Components, load_placed_denoiser
from eval.qwen.weights.encoders import PlacedVAE
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement, make_placement
from scripts.bench import memory as bench
from tests.adapters import use_adapters
from tests.eval.qwen.weights.test_adapters import velocity
from tests.train.model.test_adapter import close, fresh, trained
from train.model.denoiser import Denoiser
from train.model.quantize import QuantizedLinear

F32 = torch.float32
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ModelDirectory:
    return ModelDirectory.resolve(tiny_model_dir)


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> torch.Tensor:
    return velocity(fresh(tiny_model_dir))


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained(fresh(tiny_model_dir)).export(folder, {"objective": "flow"})
    return folder


@pytest.fixture(scope="module")
def dora(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    trained(fresh(tiny_model_dir), dora=True).export(folder, {"objective": "flow"})
    return folder


@pytest.fixture(scope="module")
def gguf_files(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """The tiny transformer in GGUF: everything but one layer F16, and the blocks' layers Q8_0 under ComfyUI's prefix."""
    folder = tmp_path_factory.mktemp("gguf")
    weights = fresh(tiny_model_dir).dit.state_dict()
    bench.write_gguf(weights, folder / "Q8_0.gguf", prefix="model.diffusion_model.")
    writer = gguf.GGUFWriter(folder / "F16.gguf", "qwen_image")
    for name, weight in weights.items():
        if name == "img_in.weight":
            writer.add_tensor(name, gguf.quantize(weight.numpy(), Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, weight.numpy().astype(np.float16 if weight.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {kind: folder / f"{kind}.gguf" for kind in ("F16", "Q8_0")}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square."""
    return float((actual - expected).norm() / expected.norm())


def num_bytes(denoiser: Denoiser) -> int:
    """Of the blocks' parameters and buffers."""
    blocks = denoiser.dit.transformer_blocks
    return sum(t.numel() * t.element_size() for t in [*blocks.parameters(), *blocks.buffers()])


# int8: 1/254 of the largest weight of a row at most; fp8: 3 bits of mantissa; nf4: 16 levels. The bounds are about twice what
# was measured, and a quantisation that does nothing falls below the lower ones.
@pytest.mark.parametrize(
    ("weights", "share", "low", "high"),
    [("int8", 0.28, 1e-4, 0.02), ("fp8", 0.28, 1e-3, 0.06), ("nf4", 0.18, 1e-2, 0.18)],
)
def test_quantised_weights(model, base, adapter, dora, weights, share, low, high):
    full = fresh(model.path)
    components = Components(model, Placement(dtype=F32, weights=weights))
    with components.denoiser() as denoiser:
        assert low < error(velocity(denoiser), base) < high
        assert num_bytes(denoiser) < share * num_bytes(full)
        kept = {
            type(module) for name, module in denoiser.dit.named_modules() if name in ("img_in", "txt_in", "proj_out")
        }
        assert kept == {torch.nn.Linear}
        plain = velocity(denoiser)
    with components.denoiser([AdapterUse(adapter)]) as denoiser:  # the adapter on top, in float
        merged = fresh(model.path)
        use_adapters(merged, [AdapterUse(adapter)])
        expected = velocity(merged)
        assert error(velocity(denoiser), expected) < high < error(base, expected)
        assert {p.dtype for name, p in denoiser.named_parameters() if ".lora_" in name} == {F32}
    with (
        pytest.raises(InputError, match=r"DoRA adapter, which needs .* weights=full"),
        components.denoiser([AdapterUse(dora)]),
    ):
        pass
    with components.denoiser() as denoiser:
        assert torch.equal(velocity(denoiser), plain)


def test_weights_are_rounded_one_at_a_time(model, monkeypatch):
    """Whenever the next tensor is read, every weight of the blocks that came before it is 8 bits."""
    seen = []
    original = ModelDirectory.tensors

    def watched(self, component):
        for name, tensor in original(self, component):
            yield name, tensor
            seen.append(name)

    monkeypatch.setattr(ModelDirectory, "tensors", watched)
    denoiser = load_placed_denoiser(model, Placement(dtype=F32, weights="int8"))
    linear = [module for module in denoiser.dit.transformer_blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(module) for module in linear} == {QuantizedLinear}
    assert {module.weight.dtype for module in linear} == {torch.int8}
    assert len(seen) == len(model.shapes("transformer"))


def test_gguf(model, base, adapter, gguf_files, tmp_path):
    expected = fresh(model.path).dit.state_dict()
    exact = load_placed_denoiser(model, Placement(dtype=F32, gguf=gguf_files["F16"]))
    img_in = expected.pop("img_in.weight").numpy()
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(img_in, Q8_0), Q8_0))
    assert torch.equal(exact.dit.img_in.weight, rounded)  # outside the blocks nothing stays quantised
    for name, weight in expected.items():
        assert torch.equal(exact.dit.get_parameter(name), weight.half().float() if weight.ndim == 2 else weight), name
    components = Components(model, Placement(dtype=F32, gguf=gguf_files["Q8_0"]))
    with components.denoiser() as denoiser:
        assert 1e-4 < error(velocity(denoiser), base) < 0.02
        assert num_bytes(denoiser) < 0.3 * num_bytes(fresh(model.path))
        plain = velocity(denoiser)
    with components.denoiser([AdapterUse(adapter)]) as denoiser:
        assert not close(velocity(denoiser), plain)
    with components.denoiser() as denoiser:
        assert torch.equal(velocity(denoiser), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, weight: (name + "x", weight), "holds 'img_in.biasx', which this transformer lacks"),
        (lambda name, weight: (name, weight[:-1]), r"is for another model: 'img_in.bias' has shape \(95,\)"),
        (None, "lacks .* tensors, the first is"),
    ],
)
def test_gguf_of_something_else(model, tmp_path, change, message):
    weight = fresh(model.path).dit.img_in.bias.numpy()
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen_image")
    writer.add_tensor(*(change("img_in.bias", weight) if change else ("img_in.bias", weight)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=message):
        load_placed_denoiser(model, Placement(dtype=F32, gguf=tmp_path / "other.gguf"))


@pytest.mark.parametrize("kind", ["full", "int8", "fp8", "nf4", "gguf"])
def test_streamed_layers(model, adapter, dora, gguf_files, kind, monkeypatch):
    """The same pictures bit for bit, with adapters put on, changed and taken off; on a CPU, which `Placement` would refuse."""
    monkeypatch.setattr(Placement, "_check_offload", lambda self: None)
    stored = {"gguf": gguf_files["Q8_0"]} if kind == "gguf" else {"weights": kind}
    streamed, expected = (Components(model, Placement(dtype=F32, offload=o, **stored)) for o in ("layer", "none"))
    uses = [[], [AdapterUse(adapter)], [AdapterUse(adapter, 0.5)], []]
    for adapters in [*uses, [AdapterUse(dora)], []] if kind == "full" else uses:
        with streamed.denoiser(adapters) as mine, expected.denoiser(adapters) as theirs:
            assert torch.equal(velocity(mine), velocity(theirs))
            assert len(mine.offload.waiting) == len(mine.dit.transformer_blocks)
            slots = {memory.untyped_storage().data_ptr() for memory in mine.offload.slots}
            weights = {p for n, p in mine.dit.transformer_blocks.named_parameters() if ".lora_" not in n}
            assert {parameter.untyped_storage().data_ptr() for parameter in weights} == slots


def test_only_what_is_used_is_loaded(model, adapter):
    components = Components(model, Placement(dtype=F32))
    assert components.loaded == set()
    with components.vae() as vae:
        assert components.loaded == {"vae"}
    with components.denoiser() as first:
        assert components.loaded == {"vae", "denoiser"}
        plain = velocity(first)
    with components.denoiser([AdapterUse(adapter)]) as second, components.vae() as again:
        assert (second.dit, again) == (first.dit, vae)
        weight = second.dit.transformer_blocks[0].attn.to_q.weight
        adapted = velocity(second)
    with components.denoiser() as third:
        assert third.dit.transformer_blocks[0].attn.to_q.weight is weight
        assert torch.equal(velocity(third), plain)
    assert not close(adapted, plain)
    assert components.loaded == {"vae", "denoiser"}
    components.free("vae")
    assert components.loaded == {"denoiser"}
    components.free()
    assert components.loaded == set()


def test_an_adapter_that_was_trained_on_is_read_again(model, tiny_model_dir, tmp_path):
    components = Components(model, Placement(dtype=F32))
    found = []
    for seed in (1, 2):
        trained(fresh(tiny_model_dir), seed=seed).export(tmp_path, {})
        with components.denoiser([AdapterUse(tmp_path)]) as denoiser:
            found.append(velocity(denoiser))
    assert not close(found[0], found[1])
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no adapter at"), components.denoiser([AdapterUse(tmp_path)]):
        pass


def test_model_offload_has_one_part_at_a_time(model, adapter, base):
    components = Components(model, Placement(dtype=F32, offload="model"))
    image = Image.new("RGB", (64, 64), "red")
    with components.encoders() as (vae, prompt_encoder):
        latents = vae.encode(torch.zeros(1, 3, 64, 64))
        prompt_encoder.encode("blue", [image])
        assert components.loaded == {"vae", "prompt_encoder"}
    with components.denoiser([AdapterUse(adapter)]) as denoiser:
        assert components.loaded == {"denoiser"}
        adapted = velocity(denoiser)
        with components.vae() as vae:  # what is in use is not set aside
            assert components.loaded == {"denoiser", "vae"}
            assert torch.equal(vae.encode(torch.zeros(1, 3, 64, 64)), latents)
    with components.vae():
        assert components.loaded == {"vae"}
    with components.denoiser() as denoiser:
        assert torch.equal(velocity(denoiser), base)
    with components.vae(), components.denoiser([AdapterUse(adapter)]) as denoiser:
        assert torch.equal(velocity(denoiser), adapted)


@torch.no_grad()
def test_tiles_have_no_seams(model):
    """A photograph-like picture of two by two tiles, decoded whole and in tiles.

    A convolution sees 30-odd latent cells at most and the overlap fades over 16, so the two differ a little everywhere near a
    seam (the attention in the middle sees all of a tile); a hard seam would show as a jump between neighbouring rows.
    """
    plain = load_vae(model, dtype=F32)
    tiled = PlacedVAE(plain, torch.device("cpu"), tiled=True)
    height, width = 576, 544
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 4, width), indexing="ij")
    pixels = torch.stack([torch.sin(x * y), torch.cos(3 * x), torch.sin(2 * y + x)])[None] * 0.8
    whole, parts = plain.encode(pixels), tiled.encode(pixels)
    assert whole.shape == parts.shape
    assert error(parts, whole) < 0.05
    decoded, in_tiles = plain.decode(whole), tiled.decode(whole)
    assert decoded.shape == in_tiles.shape == pixels.shape
    psnr = -10 * math.log10(float(((decoded - in_tiles) / 2).square().mean()))
    assert psnr > 35
    jumps, expected = (image.diff(dim=2).abs().mean(dim=(0, 1, 3)) for image in (in_tiles, decoded))
    assert float((jumps - expected).abs().max()) < 0.1 * float(expected.max())
    small = torch.zeros(1, 3, 64, 64)
    assert torch.equal(tiled.encode(small), plain.encode(small))  # one tile is the whole


def test_bench_measures_an_edit(model, tmp_path):
    """int8 of 96-wide blocks: a byte a weight, four more of scale and two of bias for each output; bfloat16 around them."""
    args = Namespace(device="cpu", dtype="bfloat16", size=64, steps=1, repeat=1)
    full, int8 = (
        bench.measure_edit(model.path, args, s, tmp_path / f"{i}") for i, s in enumerate([{}, {"weights": "int8"}])
    )
    shapes = model.shapes("transformer")
    assert full.stored == full.on_device == 2 * sum(math.prod(shape) for shape in shapes.values())
    matrices = [s for name, s in shapes.items() if len(s) == 2 and name.startswith("transformer_blocks.")]
    assert full.stored - int8.stored == sum(math.prod(shape) - 4 * shape[0] for shape in matrices)
    assert full.seconds > 0
    assert bench.psnr(f"{full.picture}.npy", f"{full.picture}.npy") == "same"
    assert 25 < float(bench.psnr(f"{full.picture}.npy", f"{int8.picture}.npy").removesuffix(" dB")) < 70


def test_encoders_on_another_device(model):
    """Numbers come back to the denoiser's device; `meta` stands for it, because there is one real device here."""
    components = Components(model, Placement(torch.device("meta"), F32, encoder_device=torch.device("cpu")))
    with components.encoders() as (vae, prompt_encoder):
        assert vae.encode(torch.zeros(1, 3, 64, 64)).device.type == "meta"
        assert prompt_encoder.encode("blue", [Image.new("RGB", (64, 64))]).device.type == "meta"
        assert next(vae.module.parameters()).device.type == "cpu"


@pytest.mark.parametrize("weights", ["full", "int8", "fp8", "nf4"])
def test_settings_say_where_products_are_in_8_bits(weights):
    """`meta` stands for a GPU that has the units."""
    gpu, cpu = (Placement(torch.device(name), weights=weights).numbers for name in ("meta", "cpu"))
    assert gpu.get("products") == (weights if weights in ("int8", "fp8") else None)
    assert "products" not in cpu


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "cuda:7"}, "device cuda:7 needs a GPU|there is no device cuda:7"),
        ({"encoder_device": "mps"}, "device mps needs an Apple GPU"),
        ({"dtype": "int4"}, "dtype is one of bfloat16, float16, float32, got 'int4'"),
        ({"offload": "disk"}, "offload is one of none, model, layer, got 'disk'"),
        ({"offload": "layer"}, "device is cpu: use offload=model"),
        ({"weights": "int2"}, "weights is one of full, int8, fp8, nf4, got 'int2'"),
        ({"weights": "int8", "dtype": "float16"}, "float16 would overflow"),
        ({"gguf": Path("none.gguf")}, "no GGUF file at none.gguf"),
        ({"gguf": Path("pyproject.toml")}, "pyproject.toml is not a GGUF file"),
    ],
)
def test_what_cannot_be_served_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_placement(**({"device": "cpu", "dtype": "bfloat16"} | options))


def test_contradictions_and_missing_packages_are_refused(gguf_files, monkeypatch):
    with pytest.raises(InputError, match="gguf and weights=int8 both set"):
        make_placement("cpu", "float32", weights="int8", gguf=gguf_files["Q8_0"])
    for module in ("eval.request.placement", "train.model.quantize"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    with pytest.raises(InputError, match="weights=nf4 needs the package bitsandbytes: pip install bitsandbytes"):
        make_placement("cpu", "float32", weights="nf4")
    with pytest.raises(InputError, match="needs the package gguf: pip install gguf"):
        make_placement("cpu", "float32", gguf=gguf_files["Q8_0"])
