"""The maths: paths, sigma samplers, objectives, pixel and mask terms. Pure torch, no input or output."""

from losses.batch import Batch, Condition, Edit
from losses.bridge_matching import LatentBridgeMatchingLoss
from losses.flow_matching import FlowMatchingLoss, GaussianWeighting
from losses.paths import BridgePath, FlowPath, PathSample, predict_target
from losses.pixel import PixelTerm
from losses.randomness import SampleRandom
from losses.sigmas import DiscreteSigma, LogitNormalSigma, QwenShiftedSigma, UniformSigma, qwen_shift, qwen_shift_mu
from losses.terms import LossTerms

__all__ = [
    "Batch",
    "BridgePath",
    "Condition",
    "DiscreteSigma",
    "Edit",
    "FlowMatchingLoss",
    "FlowPath",
    "GaussianWeighting",
    "LatentBridgeMatchingLoss",
    "LogitNormalSigma",
    "LossTerms",
    "PathSample",
    "PixelTerm",
    "QwenShiftedSigma",
    "SampleRandom",
    "UniformSigma",
    "predict_target",
    "qwen_shift",
    "qwen_shift_mu",
]
