"""Checkpoints without the command: whatever happens during a save, what can be loaded is whole."""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from train.model.adapter import Adapter, attach_lora
from train.model.denoiser import load_denoiser
from train.optim import AdamW, Optimizer, Prodigy
from train.record.checkpoint import Checkpoints, read_checkpoint

# Python 3.12 warns of forking beside threads; the children here only write files
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
FILES = {
    *("adapter_model.safetensors", "adapter_config.json", "training_lora.safetensors"),
    *("optimizer.safetensors", "state.json", "config.yaml"),
}


@pytest.fixture(scope="module")
def adapter(tiny_model_dir) -> Adapter:
    denoiser = load_denoiser(ModelDirectory.resolve(str(tiny_model_dir)), "cpu", torch.float32)
    return attach_lora(denoiser, rank=4, alpha=4, target_modules=["to_q", "to_out.0"])


def trained(adapter: Adapter, step: int, kind: type = AdamW) -> Optimizer:
    """Sets every weight to `step` and gives the optimizer a state; one update of rate 0 changes no weight."""
    optimizer = kind(adapter.parameters(), lr=1e-30)
    for parameter in adapter.parameters():
        parameter.data.fill_(float(step))
        parameter.grad = torch.full_like(parameter, step)
    optimizer.step(0)
    return optimizer


def saved(folder: Path, adapter: Adapter, steps, keep_last: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last, {"objective": "lbm"}, "name: test\n")
    for step in steps:
        checkpoints.save(step, adapter, trained(adapter, step), {"data": "abc"})
    return checkpoints


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process and returns its id; the child never comes back into pytest."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(1)


def test_what_a_checkpoint_holds(adapter, tmp_path):
    checkpoints = saved(tmp_path, adapter, [3])
    assert {file.name for file in (tmp_path / "step-000003").iterdir()} == FILES
    assert (tmp_path / "latest").read_text() == "step-000003\n"
    found = checkpoints.find("auto")
    assert found is not None
    assert (found.step, found.config, found.run) == (3, "name: test\n", {"data": "abc", "optimizer": "AdamW"})
    assert found.lora.keys() == adapter.named_parameters().keys()  # nothing frozen


@pytest.mark.parametrize("kind", [AdamW, Prodigy])
def test_restored_bit_for_bit(adapter, tmp_path, kind):
    optimizer = trained(adapter, 3, kind)
    Checkpoints(tmp_path, 3, {}, "").save(3, adapter, optimizer, {})
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    other = trained(adapter, 7, kind)
    read_checkpoint(tmp_path / "step-000003").restore(adapter, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    mine, restored = optimizer.torch_optimizer, other.torch_optimizer
    for parameter in adapter.parameters():
        assert mine.state[parameter].keys() == restored.state[parameter].keys()
        for name, value in mine.state[parameter].items():
            again = restored.state[parameter][name]
            if isinstance(value, torch.Tensor):
                assert again.dtype == value.dtype
                assert torch.equal(again, value)
    assert mine.param_groups[0].keys() == restored.param_groups[0].keys()


def test_prodigy_exports_the_average_and_keeps_the_weights(adapter, tmp_path):
    optimizer = Prodigy(adapter.parameters(), d0=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) + 1
        optimizer.step(step)
    Checkpoints(tmp_path, 3, {}, "").save(20, adapter, optimizer, {})
    exported = load_file(tmp_path / "step-000020" / "adapter_model.safetensors")
    raw = load_file(tmp_path / "step-000020" / "training_lora.safetensors")
    assert all(torch.equal(raw[name], tensor) for name, tensor in adapter.state_dict().items())
    with optimizer.averaged():
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(exported[f"diffusion_model.{name}"], tensor)
            assert not torch.equal(tensor, raw[name])


def test_only_the_last_ones_stay(adapter, tmp_path):
    saved(tmp_path, adapter, [1, 2, 999_999, 1_000_000], keep_last=2)
    assert steps_in(tmp_path) == ["latest", "step-1000000", "step-999999"]


def test_going_back_deletes_nothing_new(adapter, tmp_path):
    """Continued from step 2 because step 6 is damaged: the damaged one must not push out what is written now."""
    saved(tmp_path, adapter, [2, 6])
    (tmp_path / "step-000006" / "state.json").unlink()
    checkpoints = saved(tmp_path, adapter, [3], keep_last=1)
    assert (tmp_path / "latest").read_text() == "step-000003\n"
    found = checkpoints.find("auto")
    assert found is not None
    assert found.step == 3


STATE_FILES = ("training_lora.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("config.yaml", "missing"), *((name, damage) for name in STATE_FILES for damage in ("missing", "cut"))],
)
def test_a_damaged_one_gives_way(adapter, tmp_path, capsys, name, damage):
    checkpoints = saved(tmp_path, adapter, [1, 2])
    file = tmp_path / "step-000002" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    found = checkpoints.find("auto")
    assert found is not None
    assert found.step == 1
    warning = capsys.readouterr().err
    assert f"step-000002/{name} is damaged or missing" in warning
    assert "trying the previous one" in warning


def test_all_damaged_is_an_error(adapter, tmp_path):
    checkpoints = saved(tmp_path, adapter, [1])
    (tmp_path / "step-000001" / "state.json").write_text("")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        checkpoints.find("auto")
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        checkpoints.find(str(tmp_path / "step-000001"))


def test_resume_by_word_and_by_path(adapter, tmp_path):
    checkpoints = saved(tmp_path / "a", adapter, [1, 2])
    with pytest.raises(InputError, match="resume=never"):
        checkpoints.find("never")
    found = checkpoints.find(str(tmp_path / "a" / "step-000001"))
    assert found is not None
    assert found.step == 1
    empty = Checkpoints(tmp_path / "b", 3, {}, "")
    assert empty.find("never") is None
    assert empty.find("auto") is None
    with pytest.raises(InputError, match="no checkpoint at nowhere"):
        empty.find("nowhere")


def test_another_optimizer_is_refused(adapter, tmp_path):
    checkpoint = saved(tmp_path, adapter, [1]).find("auto")
    assert checkpoint is not None
    with pytest.raises(InputError, match="was trained with AdamW, not ProdigyPlusScheduleFree"):
        checkpoint.restore(adapter, Prodigy(adapter.parameters()))


def test_a_full_disk_leaves_no_half(adapter, tmp_path):
    """Files may not grow above 4 kB, as on a full disk: the save fails, and its half is gone."""
    saved(tmp_path, adapter, [1])

    def save_on_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            saved(tmp_path, adapter, [2])
        except (OSError, SafetensorError):
            os._exit(3)

    _, status = os.waitpid(in_child(save_on_full_disk), 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert steps_in(tmp_path) == ["latest", "step-000001"]
    assert read_checkpoint(tmp_path / "step-000001").step == 1


def test_killed_at_any_moment(adapter, tmp_path):
    """A process that does nothing but save is killed again and again: the newest checkpoint is always whole."""
    moments = random.Random(0)
    checkpoints = saved(tmp_path, adapter, [1], keep_last=2)
    newest = 1
    for _ in range(12):
        child = in_child(partial(saved, tmp_path, adapter, range(newest + 1, 10_000), keep_last=2))
        time.sleep(moments.uniform(0.03, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = checkpoints.find("auto")
        assert found is not None
        assert found.step >= newest
        newest = found.step
        assert found.path.name == f"step-{newest:06d}"
        assert all(bool((tensor == newest).all()) for tensor in found.lora.values())
        written = int((tmp_path / "latest").read_text().strip().removeprefix("step-"))
        assert newest - 1 <= written <= newest
    assert newest > 12


def test_the_best_and_every_so_many_stay_as_adapters(adapter, tmp_path):
    """What continuing needs goes, and with it most of the bytes; what is left is no checkpoint to continue from."""
    checkpoints = Checkpoints(tmp_path, 1, {}, "name: test\n", keep_every=4, best_by="auto")
    scores = {1: 20.0, 2: 23.0, 3: 22.0, 4: 21.0, 5: 20.0}
    for step, score in scores.items():
        checkpoints.save(step, adapter, trained(adapter, step), {})
        checkpoints.judge(step, {"validation/steps_1/psnr": 30.0, "validation/steps_4/psnr": score})
    assert checkpoints.best() == {"step": 2, "name": "validation/steps_4/psnr", "value": 23.0}
    assert steps_in(tmp_path) == ["best.json", "latest", "step-000002", "step-000004", "step-000005"]
    for step in (2, 4):
        names = {file.name for file in (tmp_path / f"step-{step:06d}").iterdir()}
        assert names == FILES - {"training_lora.safetensors", "optimizer.safetensors"}
    (tmp_path / "step-000005" / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.find("auto")


def test_best_is_the_lowest_of_a_distance(adapter, tmp_path):
    checkpoints = saved(tmp_path, adapter, [1, 2])
    checkpoints.best_by = "validation/steps_4/lpips"
    for step, score in ((0, 0.1), (1, 0.3), (2, 0.4)):
        checkpoints.judge(step, {"validation/steps_4/lpips": score})
    assert checkpoints.best() == {"step": 1, "name": "validation/steps_4/lpips", "value": 0.3}  # step 0 has none
    with pytest.raises(
        InputError, match=r"best_by=validation/steps_4/lpips is not a number .* It reports validation/steps_1/psnr"
    ):
        checkpoints.judge(0, {"validation/steps_1/psnr": 20.0})
