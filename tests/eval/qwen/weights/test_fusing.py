"""Adapters inside the weights: what rounding costs, nothing left behind, and nothing read or moved more often than needed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_prep.model.directory import ModelDirectory
from eval.qwen.weights import components as module
from eval.qwen.weights.adapters import added_up
from eval.qwen.weights.components import Components
from eval.qwen.weights.fusing import FusedAdapters
from eval.qwen.weights.waiting import WaitingWeights
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from eval.request.recent import Recent
from tests.adapters import fuse_adapters, use_adapters
from tests.eval.qwen.weights.test_adapters import velocity
from tests.train.model.test_adapter import fresh, trained
from train.model.adapter_reader import fused_weight, linear_modules
from train.model.denoiser import Denoiser, load_denoiser
from train.model.offload import Layout

F32 = torch.float32


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ModelDirectory:
    return ModelDirectory.resolve(tiny_model_dir)


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs that share some modules, and a DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "a": {"target_modules": ["to_q", "img_mlp.net.2", "img_in"]},
        "b": {"target_modules": ["to_q", "to_out.0", "proj_out"], "seed": 1},
        "dora": {"target_modules": ["to_q", "img_in"], "dora": True, "seed": 2},
    }
    for name, options in kinds.items():
        trained(fresh(tiny_model_dir), **options).export(folder / name, {"objective": "flow"})
    return {name: folder / name for name in kinds}


@pytest.fixture
def waits(monkeypatch):
    """Parts wait in CPU memory as if the device were another, which here is the CPU too."""
    monkeypatch.setattr(Components, "_is_accelerated", lambda self, name: True)


def state(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in denoiser.dit.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square."""
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def exact(model: ModelDirectory, path: Path, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocities of the model's bfloat16 weights without and with an adapter, in float64 but for the products."""
    denoiser = load_denoiser(model, dtype=torch.bfloat16).float()
    plain = velocity(denoiser)
    for name, part in added_up(denoiser.dit, [AdapterUse(path, weight)]).items():
        own = denoiser.dit.get_submodule(name).weight
        own.copy_(own.double() + part.up.double() @ part.down.double())
    return plain, velocity(denoiser)


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_what_rounding_costs(model, adapters, weight):
    """In float32 nothing that counts. In bfloat16 a fused adapter is as near to the exact one as an adapter beside the weights,
    whose products are rounded too: both have the error that bfloat16 has without any adapter, within a quarter."""
    plain, expected = exact(model, adapters["a"], weight)
    uses = [AdapterUse(adapters["a"], weight)]
    bare, fused, beside = (load_denoiser(model, dtype=torch.bfloat16) for _ in range(3))
    fuse_adapters(fused, uses)
    use_adapters(beside, uses)
    usual = error(velocity(bare), plain)
    assert error(velocity(fused), expected) < 1.25 * usual
    assert error(velocity(beside), expected) < 1.25 * usual
    fused, beside = fresh(model.path), fresh(model.path)
    fuse_adapters(fused, uses)
    use_adapters(beside, uses)
    assert error(velocity(fused), velocity(beside)) < 2e-6


def test_a_weight_is_rounded_once():
    """To the nearest bfloat16 of the sum in float32, also where the adapter is rounded away in part."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).bfloat16()
    down, up = torch.randn(4, 32, generator=generator), 1e-3 * torch.randn(48, 4, generator=generator)
    found = fused_weight(weight, module.LowRank(down, up)).to(weight.dtype)
    sums = weight.double() + up.double() @ down.double()
    spacing = torch.exp2(torch.floor(torch.log2(sums.abs())) - 7)
    assert found.dtype == torch.bfloat16
    assert float(((found.double() - sums).abs() / spacing).max()) < 0.5 + 1e-3
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_nothing_is_left_behind(model, adapters, dtype):
    """The weights of an adapter are the same bits whatever was there before, and so are the base model's without any."""
    a, b, dora = (AdapterUse(adapters[name], 0.7) for name in ("a", "b", "dora"))
    components, expected = Components(model, Placement(dtype=dtype)), {}
    for name, uses in {"none": [], "a": [a], "ab": [a, b], "dora": [dora]}.items():
        with Components(model, Placement(dtype=dtype)).denoiser(uses) as denoiser:
            expected[name] = state(denoiser)
    for name, uses in [("a", [a]), ("dora", [dora]), ("ab", [a, b]), ("none", []), ("a", [a]), ("none", [])]:
        with components.denoiser(uses) as denoiser:
            assert equal(state(denoiser), expected[name]), name
    assert not equal(expected["a"], expected["none"])


def test_a_failure_half_way_is_repaired(model, adapters, monkeypatch):
    components = Components(model, Placement(dtype=F32))
    with components.denoiser() as denoiser:
        base = state(denoiser)

    def failing(weight, part, calls=[]):  # noqa: B006  # counts
        calls.append(part)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return fused_weight(weight, part)

    with monkeypatch.context() as broken:
        broken.setattr("eval.qwen.weights.fusing.fused_weight", failing)
        with pytest.raises(torch.OutOfMemoryError), components.denoiser([AdapterUse(adapters["a"])]):
            pass
    assert not equal(state(denoiser), base)
    with components.denoiser() as denoiser:
        assert equal(state(denoiser), base)


def test_a_failure_half_way_is_repaired_in_a_block_that_has_come(model, adapters, monkeypatch):
    """Of the two modules that the adapter changes in a block, one has it already when the other fails."""
    monkeypatch.setattr(Placement, "_check_offload", lambda self: None)
    streamed, expected = (Components(model, Placement(dtype=F32, offload=each)) for each in ("layer", "none"))
    uses, calls = [AdapterUse(adapters["a"])], []

    def failing(weight, part):
        calls.append(part)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return fused_weight(weight, part)

    with streamed.denoiser(uses) as mine, expected.denoiser(uses) as theirs:
        with monkeypatch.context() as broken:
            broken.setattr("eval.qwen.weights.fusing.fused_weight", failing)
            with pytest.raises(torch.OutOfMemoryError):
                velocity(mine)
        assert torch.equal(velocity(mine), velocity(theirs))


def test_an_adapter_that_comes_back_is_not_read_again(model, adapters, monkeypatch):
    read = []
    original = module.read_file
    monkeypatch.setattr(module, "read_file", lambda use, linear: read.append(use.path.name) or original(use, linear))
    components = Components(model, Placement(dtype=F32))
    for name, weight in [("a", 1), ("b", 1), ("a", 1), ("a", 0.5), ("b", 1), ("a", 1)]:
        with components.denoiser([AdapterUse(adapters[name], weight)]):
            pass
    assert read == ["a", "b"]


@pytest.mark.parametrize(("processes", "device", "num_reads"), [(2, "cuda", 2), (4, "cuda", 4), (1, "mps", 4)])
def test_the_base_weights_are_read_again_once(model, adapters, monkeypatch, capsys, processes, device, num_reads):
    """By the second adapter; from then on they come from CPU memory, if a GPU computes and each process of the machine has room.
    Here there is room for three."""
    size = Layout(fresh(model.path).dit).num_bytes
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(module, "WaitingWeights", lambda dit, _: WaitingWeights(dit, torch.device("cpu")))
    reads = []
    original = ModelDirectory.tensors
    monkeypatch.setattr(ModelDirectory, "tensors", lambda *args: reads.append(args[1]) or original(*args))
    components = Components(model, Placement(dtype=F32))
    expected = {}
    for name in ("a", "b"):
        with Components(model, Placement(dtype=F32)).denoiser([AdapterUse(adapters[name])]) as denoiser:
            expected[name] = state(denoiser)
    reads.clear()
    with components.denoiser():
        monkeypatch.setattr(components, "_home", lambda name: SimpleNamespace(type=device))  # for the switches alone
    for name in ("a", "b", "a", "b"):
        with components.denoiser([AdapterUse(adapters[name])]) as denoiser:
            assert equal(state(denoiser), expected[name])
    assert reads == ["transformer"] * num_reads
    said = capsys.readouterr().err
    assert said.count("every change of adapters reads the transformer's files") == (processes == 4)


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_waiting_parts_come_as_they_were(model, adapters, waits, weights):
    """Moved and not read again, with whatever adapter is wanted next."""
    components = Components(model, Placement(dtype=F32, weights=weights, offload="model"))
    plain = Components(model, Placement(dtype=F32, weights=weights))
    for uses in ([AdapterUse(adapters["a"])], [AdapterUse(adapters["a"])], [], [AdapterUse(adapters["b"])]):
        with components.encoders() as (vae, prompt_encoder):
            assert vae.encode(torch.zeros(1, 3, 64, 64)).isfinite().all()
            assert next(prompt_encoder.model.parameters()).data_ptr() != 0
        with components.denoiser(uses) as denoiser, plain.denoiser(uses) as theirs:
            assert torch.equal(velocity(denoiser), velocity(theirs))
            memory = components._waiting["denoiser"].memory
            first = memory.data_ptr()
            assert not any(first <= p.data_ptr() < first + memory.nbytes for p in denoiser.dit.parameters())
    assert components.moves == {"vae": 4, "prompt_encoder": 4, "denoiser": 4}


def test_fused_modules_are_plain(model, adapters):
    """No layer stands beside a weight: a step costs what it costs without an adapter."""
    denoiser = fresh(model.path)
    before = {name: type(each) for name, each in denoiser.dit.named_modules()}
    FusedAdapters(denoiser, lambda names: None).use(added_up(denoiser.dit, [AdapterUse(adapters["a"])]))
    assert {name: type(each) for name, each in denoiser.dit.named_modules()} == before
    assert linear_modules(denoiser.dit).keys() <= before.keys()


def test_recent_values_stay_within_their_bytes():
    made, recent = [], Recent[bytes](10, len)

    def get(key: str, size: int) -> bytes:
        return recent.get(key, lambda: made.append(key) or bytes(size))

    for key, size in [
        ("a", 4),
        ("b", 4),
        ("a", 4),
        ("c", 4),
        ("a", 4),
        ("b", 4),
        ("large", 99),
        ("large", 99),
        ("a", 4),
    ]:
        assert len(get(key, size)) == size
    assert made == ["a", "b", "c", "b", "large", "a"]
