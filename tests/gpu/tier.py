"""Which test bodies run on which device.

`pytest -m gpu` runs all of them on a GPU, in one process. The rest of the suite runs on the CPU those that have no twin among its
own tests; what a body names as its twin takes the same branches there. `TIER_DEVICE=cpu pytest -m gpu` runs all bodies on the
CPU, so that on a GPU nothing but the device is new.
"""

import os
from collections.abc import Mapping

import pytest
import torch

CPU = torch.device("cpu")
TIER = torch.device(os.environ.get("TIER_DEVICE", "cuda"))
if TIER.type == "cuda":
    TIER = torch.device("cuda", TIER.index or 0)
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(TIER.type == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
)


def on_devices(twins: Mapping[str, str]) -> pytest.MarkDecorator:
    """Parametrises a test by `device` and `name`.

    Args:
        twins: name of a body -> the test that takes its branches on the CPU, as `file::test` below tests/; empty where there is
            none, and the body itself runs there.
    """
    own = [pytest.param(CPU, name, id=f"cpu-{name}") for name, twin in twins.items() if not twin]
    tier = [pytest.param(TIER, name, id=f"gpu-{name}", marks=GPU) for name in twins]
    return pytest.mark.parametrize(("device", "name"), [*own, *tier])
