"""Triton's kernels, run on the CPU by its interpreter, against the operations that they stand for."""

import importlib
import sys

import pytest
import torch

from tests.train.model.layers.test_lora import drawn
from train.model import quantize


@pytest.fixture
def kernels(monkeypatch):
    """The module as it is where TRITON_INTERPRET is set."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "train.model.layers.kernels", raising=False)
    yield importlib.import_module("train.model.layers.kernels")
    sys.modules.pop("train.model.layers.kernels", None)


@pytest.mark.parametrize("sums_type", [torch.int32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", [(3, 1100), (1, 16)])
def test_sums_are_scaled(kernels, sums_type, scaled, biased, add, shape):
    sums = (1e6 * drawn(*shape, seed=1, dtype=torch.float32)).to(sums_type)
    row_scale, scale = drawn(shape[0], 1, seed=2, dtype=torch.float32), drawn(shape[1], seed=3, dtype=torch.float32)
    bias, out = drawn(shape[1], seed=4, dtype=torch.bfloat16), drawn(*shape, seed=5, dtype=torch.float32)
    expected = sums.double() * row_scale.double() * (scale.double() if scaled else 1)
    expected += (bias.double() if biased else 0) + (out.double() if add else 0)
    same = out.clone()
    arguments = sums, row_scale, scale if scaled else None, bias if biased else None
    kernels.scale_sums(*arguments, out, add)
    quantize._scale_sums(*arguments, same, add)
    for found in (out, same):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(65, 130), (16, 64)])
def test_a_weight_is_turned(kernels, dtype, shape):
    weight = (50 * drawn(*shape, seed=1, dtype=torch.float32)).to(dtype)
    found = kernels.turned(weight)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), weight.t().contiguous().view(torch.uint8))
