"""Float32 that is float32 on every device."""

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its processes would outlive the tests

import pytest
import torch


@pytest.fixture(autouse=True)
def whole_float32():
    """cuDNN would round the operands of convolutions to 11 bits, and training in bfloat16 those of products from then on."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in settings]
    for each in settings:
        each.allow_tf32 = False
    yield
    for each, value in zip(settings, before, strict=True):
        each.allow_tf32 = value
