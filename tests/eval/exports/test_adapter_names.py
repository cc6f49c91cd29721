"""An adapter's file under other names: the programs whose names they are load all of it, and back again it is the same."""

import json

import numpy as np
import pytest
import torch
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffusers import QwenImageEditPlusPipeline
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from eval.exports.adapter_names import convert, module_name
from eval.exports.inspection import inspect_adapter
from eval.request.knobs import AdapterUse
from tests.adapters import fuse_adapters
from tests.train.model.test_adapter import TARGETS, close, fresh, inputs, trained
from tests.train.model.test_denoiser import run_reference
from train.model.adapter import attach_lokr
from train.model.adapter_files import read_header
from train.model.adapter_reader import linear_modules

HEADER = {"objective": "lbm", "base_model": "tiny", "sigmas": "[1.0, 0.5]", "step": "7"}


@pytest.fixture(scope="module")
def written(tiny_model_dir, tmp_path_factory):
    """LoRA with several ranks and scales, DoRA, and LoKr with whole factors and products; and each one's velocity."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for kind in ("lora", "dora", "lokr", "lokr_low"):
        denoiser = fresh(tiny_model_dir)
        with torch.no_grad():
            if kind == "lora":
                adapter = trained(denoiser, rank_pattern={"img_mlp.net.2": 1}, alpha_pattern={"to_q": 3})
            elif kind == "dora":
                adapter = trained(denoiser, dora=True, alpha=4)
            else:
                adapter = attach_lokr(denoiser, 2 if kind == "lokr_low" else 64, 3, TARGETS, kind == "lokr_low", 4)
                for seed, weight in enumerate(adapter.parameters()):
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
            made[kind] = folder / kind / "adapter_model.safetensors", len(adapter.layers), denoiser(*inputs(denoiser))
        adapter.export(folder / kind, HEADER | ({"kind": "lokr"} if kind.startswith("lokr") else {}))
    return made


@torch.no_grad()
def ours(tiny_model_dir, file) -> torch.Tensor:
    denoiser = fresh(tiny_model_dir)
    fuse_adapters(denoiser, [AdapterUse(file)])
    return denoiser(*inputs(denoiser))


@pytest.fixture(scope="module")
def in_diffusers(tiny_model_dir):
    """What of a file diffusers' own loader takes."""
    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny_model_dir, dtype=torch.float32)
    given = inputs(fresh(tiny_model_dir))
    return lambda file: loaded_in_diffusers(pipeline, given, file)


@torch.no_grad()
def loaded_in_diffusers(pipeline, given, file) -> tuple[int, torch.Tensor]:
    """How many modules diffusers' own loader touches, and what its transformer then computes."""
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    touched = [m for m in pipeline.transformer.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    return len(touched), run_reference(pipeline.transformer, *given)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "common"])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "lokr_low"])
def test_it_is_the_same_adapter_under_any_name(tiny_model_dir, written, tmp_path, kind, form):
    file, num_modules, velocity = written[kind]
    if kind.startswith("lokr") and form == "diffusers":
        with pytest.raises(InputError, match="is a LoKr adapter, and diffusers has no names for it"):
            convert(file, form, tmp_path / "new.safetensors")
        return
    assert convert(file, form, tmp_path / "new.safetensors") == num_modules
    assert close(ours(tiny_model_dir, tmp_path / "new.safetensors"), velocity)
    assert HEADER.items() <= read_header(tmp_path / "new.safetensors").items()
    assert {each.dtype for each in load_file(tmp_path / "new.safetensors").values()} == {torch.float32}
    convert(tmp_path / "new.safetensors", "common", tmp_path / "back.safetensors")
    first, back = load_file(file), load_file(tmp_path / "back.safetensors")
    for key in [key for key in first if not key.endswith(".alpha")]:
        assert (first[key] - back[key]).abs().max() <= 1e-6 * first[key].abs().max(), key


@pytest.mark.parametrize(
    ("kind", "form"), [("lora", "kohya"), ("lora", "diffusers"), ("lora", "common"), ("dora", "diffusers")]
)
def test_diffusers_loads_all_of_it(in_diffusers, written, tmp_path, kind, form):
    file, num_modules, velocity = written[kind]
    convert(file, form, tmp_path / "new.safetensors")
    touched, found = in_diffusers(tmp_path / "new.safetensors")
    assert touched == num_modules
    assert close(found, velocity)
    assert inspect_adapter(tmp_path / "new.safetensors").ignored["diffusers"] == [BRIDGE]


BRIDGE = "starts at noise unless told otherwise, and a bridge starts at the source"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Alpha detected in the LoRA file")
def test_diffsynth_loads_the_common_form_of_a_kohya_file(tiny_model_dir, written, tmp_path, capsys):
    file, num_modules, velocity = written["lora"]
    convert(file, "kohya", tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", "common", tmp_path / "common.safetensors")
    for name, number in {"kohya": 0, "common": num_modules}.items():
        denoiser = fresh(tiny_model_dir)
        pipeline = QwenImagePipeline(device="cpu", torch_dtype=torch.float32)
        pipeline.load_lora(denoiser.dit, str(tmp_path / f"{name}.safetensors"))
        assert f"{number} tensors are fused" in capsys.readouterr().out
        notes = inspect_adapter(tmp_path / f"{name}.safetensors").ignored["DiffSynth"]
        assert notes[0].startswith("loads nothing") == (number == 0)
    assert close(denoiser(*inputs(denoiser)), velocity)


def test_what_inspect_says_of_diffusers_is_what_diffusers_does(in_diffusers, written, tmp_path):
    """DoRA in the common form is refused, kohya's magnitudes are left out, bare names load nothing, LoKr is refused."""
    dora, lokr = written["dora"][0], written["lokr"][0]
    convert(dora, "kohya", tmp_path / "kohya.safetensors")
    bare = {key.removeprefix("diffusion_model."): each for key, each in load_file(written["lora"][0]).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    for file, note in (
        (dora, "refuses the file: its converter knows no DoRA"),
        (lokr, "refuses the file: its converter for"),
    ):
        assert inspect_adapter(file).ignored["diffusers"][0].startswith(note)
        with pytest.raises(ValueError, match="should be empty"):
            in_diffusers(file)
    assert "leaves out DoRA's magnitudes" in inspect_adapter(tmp_path / "kohya.safetensors").ignored["diffusers"][0]
    assert not close(in_diffusers(tmp_path / "kohya.safetensors")[1], written["dora"][2])
    assert "loads nothing" in inspect_adapter(tmp_path / "bare.safetensors").ignored["diffusers"][0]
    assert in_diffusers(tmp_path / "bare.safetensors")[0] == 0


@torch.no_grad()
@pytest.mark.parametrize("whole", ["lokr_w1", "lokr_w2"])
def test_a_lokr_of_lycoris(tiny_model_dir, tmp_path, whole):
    """Written by hand under LyCORIS's names: W + alpha / rank · kron(w1, w2), in float64, with one factor of two matrices."""
    names, rank, alpha = ("transformer_blocks.0.attn.to_q", "proj_out"), 2, 3.0
    denoiser, tensors = fresh(tiny_model_dir), {}
    for number, name in enumerate(names):
        weight = denoiser.dit.get_submodule(name).weight
        sides = {"lokr_w1": (4, 4), "lokr_w2": (weight.shape[0] // 4, weight.shape[1] // 4)}
        generator, factors = torch.Generator().manual_seed(number), []
        for kind, (rows, columns) in sides.items():
            shapes = [(rows, columns)] if kind == whole else [(rows, rank), (rank, columns)]
            matrices = [0.2 * torch.randn(shape, generator=generator) for shape in shapes]
            for ending, matrix in zip(("_a", "_b") if len(matrices) == 2 else ("",), matrices, strict=True):
                tensors[f"lycoris_{name.replace('.', '_')}.{kind}{ending}"] = matrix
            factors.append(
                np.linalg.multi_dot([*matrices, np.eye(columns)]) if len(matrices) == 2 else matrices[0].numpy()
            )
        tensors[f"lycoris_{name.replace('.', '_')}.alpha"] = torch.tensor(alpha)
        change = alpha / rank * np.kron(factors[0].astype(np.float64), factors[1].astype(np.float64))
        weight.copy_(weight.double() + torch.from_numpy(change))
    save_file(tensors, tmp_path / "other.safetensors")
    assert close(ours(tiny_model_dir, tmp_path / "other.safetensors"), denoiser(*inputs(denoiser)))
    found = inspect_adapter(tmp_path / "other.safetensors")
    assert (found.method, found.form, found.ranks) == ("LoKr", "LyCORIS: lycoris_…", {rank: 2})
    assert found.scales == "in the file; alpha / rank is 1.5"
    assert found.ignored["ComfyUI"] == ["uses all of it"]


def test_every_module_has_a_name_without_dots(tiny_model_dir):
    for name in linear_modules(fresh(tiny_model_dir).dit):
        assert module_name(name) == module_name(name.replace(".", "_")) == name
    assert module_name("transformer_blocks_59_img_mlp_net_0_proj") == "transformer_blocks.59.img_mlp.net.0.proj"
    assert module_name("transformer_blocks_0_to_q") is None
    assert module_name("down_blocks_0_to_q") is None


def test_numbers_of_another_dtype(written, tmp_path):
    convert(written["lora"][0], "kohya", tmp_path / "a.safetensors", torch.bfloat16)
    assert {each.dtype for each in load_file(tmp_path / "a.safetensors").values()} == {torch.bfloat16}
    convert(tmp_path / "a.safetensors", "common", tmp_path / "b.safetensors")
    assert {each.dtype for each in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    huge = {key: each * 1e6 for key, each in load_file(written["lora"][0]).items()}
    save_file(huge, tmp_path / "huge.safetensors")
    with pytest.raises(InputError, match=r"has numbers that torch\.float16 cannot hold"):
        convert(tmp_path / "huge.safetensors", "kohya", tmp_path / "c.safetensors", torch.float16)
    assert not (tmp_path / "c.safetensors").exists()


def test_places_that_would_hurt_are_refused(written, tmp_path):
    file = written["lora"][0]
    with pytest.raises(InputError, match="is the file that is converted"):
        convert(file, "kohya", file)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"mine\.safetensors is there already"):
        convert(file, "kohya", tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"has a adapter_config\.json of another adapter|adapter_config\.json of another"
    ):
        convert(file, "kohya", tmp_path / "adapter_model.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(1, 2)}, tmp_path / "sd.safetensors")
    with pytest.raises(InputError, match="changes a module that this model lacks"):
        convert(tmp_path / "sd.safetensors", "common", tmp_path / "x.safetensors")


def test_inspect_says_what_a_file_holds(written, tmp_path):
    found = inspect_adapter(written["lora"][0].parent)
    assert (found.method, found.num_modules, found.unknown) == ("LoRA", written["lora"][1], [])
    assert found.form.startswith("common")
    assert (found.ranks.keys(), found.steps, found.dtypes.keys()) == ({4, 1}, [1, 2], {"F32"})
    assert (found.header["objective"], found.header["step"]) == ("lbm", "7")
    assert found.ignored["this project"] == ["uses all of it"]
    text = found.as_text()
    assert "steps        1 or 2" in text
    assert f"ComfyUI: {BRIDGE}" in text
    assert json.loads(json.dumps(found.as_dict()))["num_modules"] == found.num_modules
    low = inspect_adapter(written["lokr_low"][0])
    assert (low.method, set(low.ranks)) == ("LoKr", {2})
    convert(written["lora"][0], "kohya", tmp_path / "kohya.safetensors")
    kohya = inspect_adapter(tmp_path / "kohya.safetensors")
    assert (kohya.form, kohya.scales) == ("kohya: lora_unet_…", "in the file; alpha / rank is 1")
    assert sum(kohya.endings.values()) == kohya.num_modules
    assert kohya.endings == found.endings


def test_inspect_of_something_else(tmp_path):
    save_file({"img_in.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is no adapter: no adapter has a tensor 'img_in\.weight'"):
        inspect_adapter(tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no such file")
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        inspect_adapter(tmp_path / "text.safetensors")
    tensors = {f"down_blocks.0.lora_{kind}.weight": torch.ones(1, 1) for kind in ("down", "up")}
    save_file(tensors, tmp_path / "sd.safetensors")
    found = inspect_adapter(tmp_path / "sd.safetensors")
    assert found.unknown == ["down_blocks.0"]
    assert found.ignored["this project"][0].startswith("refuses the file: it changes 1 modules")
    assert not any("uses all of it" in notes for notes in found.ignored.values())
    save_file({"img_in.lora_A.weight": torch.ones(1, 1)}, tmp_path / "half.safetensors")
    told = inspect_adapter(tmp_path / "half.safetensors").ignored["this project"]
    assert told == ["refuses the file: of img_in it has one of lora_A and lora_B alone"]


def test_inspect_names_kinds_of_adapters_that_are_not_read_here(tmp_path):
    module = "lora_unet_transformer_blocks_0_attn_to_q"
    factors = {f"{module}.hada_{name}": torch.ones(2, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    save_file(factors | {f"{module}.alpha": torch.tensor(2.0)}, tmp_path / "loha.safetensors")
    found = inspect_adapter(tmp_path / "loha.safetensors")
    assert found.others == {"LoHa": 4}
    assert found.ignored["this project"] == ["refuses the file: it reads no LoHa"]
    assert "4 tensors of LoHa" in found.as_text()
    save_file({"img_in.diff": torch.ones(2, 4), "img_in.diff_b": torch.ones(2)}, tmp_path / "diff.safetensors")
    found = inspect_adapter(tmp_path / "diff.safetensors")
    assert (found.method, found.others) == ("of another kind", {"differences of whole tensors": 2})
    assert "not looked up here" in found.ignored["diffusers"][-1]
