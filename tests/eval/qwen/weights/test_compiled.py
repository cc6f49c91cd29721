"""The compiled block in the editor: the same numbers, and no new graphs for another adapter or a part that was moved."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from data_prep.model.directory import ModelDirectory
from eval.qwen.weights.components import Components
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from tests.adapters import write_adapter
from tests.eval.qwen.test_editor import SMALL
from tests.eval.qwen.weights.test_adapters import velocity
from train.model import execution

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "int8"])
def test_compiled_blocks_with_adapters(tiny_model_dir, tmp_path, monkeypatch, capsys, weights):
    """`aot_eager` runs the traced operations as they are, so nothing may differ."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(execution, "Compiled", functools.partial(execution.Compiled, backend="aot_eager"))
    monkeypatch.setattr(Components, "_is_accelerated", lambda self, name: True)
    model = ModelDirectory.resolve(tiny_model_dir)
    adapter = AdapterUse(write_adapter(tmp_path / "a", tiny_model_dir, "flow", SMALL))
    places = [Placement(dtype=torch.float32, weights=weights, offload="model", compile=each) for each in (True, False)]
    compiled, plain = (Components(model, place) for place in places)
    graphs, wanted = [], [[], [adapter], [AdapterUse(adapter.path, 0.5)], []]
    for uses in wanted if weights == "full" else wanted[1:3]:  # beside rounded weights, none is another graph
        with compiled.denoiser(uses) as mine, plain.denoiser(uses) as theirs:
            assert torch.equal(velocity(mine), velocity(theirs))
        graphs.append(counters["stats"]["unique_graphs"])
        with compiled.vae():  # the denoiser goes and comes
            pass
    said = capsys.readouterr()
    assert "compiled a block in" in said.err
    assert "without torch.compile" not in said.err
    assert not said.out
    assert len(set(graphs)) == 1
    torch._dynamo.reset()


def test_settings_say_that_it_was_compiled():
    assert Placement(compile=True).numbers["compile"] is True
    assert "compile" not in Placement().numbers
