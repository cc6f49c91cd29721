"""What a run's objects are told by its configuration."""

import json
from dataclasses import replace
from typing import Any

import pytest

from data_prep.model.editions import FIRST, PLUS
from data_prep.model.geometry import Geometry
from eval.qwen.samplers import BridgeSampler
from losses.flow_matching import FlowMatchingLoss
from train.builders import adapter_metadata, build_loss, build_validation
from train.config import Config, compose

DATA = "data.dataset=pairs.json"


class Recorded:
    """A validation that keeps what it was built with."""

    def __init__(self, **options: Any):
        self.options = options


def lbm(*overrides: str) -> Config:
    return compose(["+exp=lbm_2511", DATA, *overrides])


@pytest.mark.parametrize(
    ("sub_prob", "starts"), [(0.25, ["source", "white"]), (0, ["source", None]), (1, ["white", None])]
)
def test_a_start_that_is_not_trained_is_not_validated(sub_prob, starts):
    config = lbm(f"loss.sub_prob={sub_prob}", f"validate._target_={__name__}.Recorded")
    parts: Any = (None, None, None)
    options = build_validation(config, *parts).options
    samplers = [options["sampler"], options["white"]]
    assert samplers == [start and BridgeSampler(start) for start in starts]


def test_the_adapter_says_at_which_sigmas_it_was_trained():
    def sigmas(config: Config, loss: Any = None) -> str | None:
        return adapter_metadata(config, loss or build_loss(config, lambda x: x), Geometry(1024), PLUS).get("sigmas")

    assert sigmas(lbm()) == "[1.0, 0.75, 0.5, 0.25]"
    assert sigmas(lbm("loss.sigma.values=[0.5,1.0]", "loss.sigma.probabilities=[1,0]")) == "[0.5]"
    uniform = replace(lbm(), loss={**lbm().loss, "sigma": {"_target_": "losses.UniformSigma"}})
    assert sigmas(uniform) is None
    assert sigmas(lbm(), FlowMatchingLoss()) is None


def test_the_adapter_says_which_edition_it_was_trained_on():
    said = adapter_metadata(lbm(), FlowMatchingLoss(), Geometry(1024), FIRST)
    assert said["base_pipeline"] == "QwenImageEditPipeline"


def test_the_presets_minimise_what_they_say():
    """The expected objective is main_weight x main + sub_weight x sub; lbm_mostly_source draws in these proportions."""
    mostly = build_loss(lbm("loss=lbm_mostly_source"), lambda x: x)
    assert mostly.weights == {"main": 0.95, "sub": 0.05}
    assert mostly.sub_prob == 0.05
    even = build_loss(lbm(), lambda x: x)
    assert even.weights == {"main": 1.0, "sub": 1.0}
    for loss in (mostly, even):
        assert loss.sigma.probabilities.tolist() == pytest.approx([0.55, 0.15, 0.15, 0.15])
        assert loss.rollout == 0
    assert json.dumps(lbm().loss)  # what the adapter's file will hold
