"""From a start to the target: the bridge sampler and the flow-matching sampler, sigmas and solvers.

Both integrate `velocity = d x / d sigma` from sigma = 1 to 0 in float32 and take their noise from the sample's own
generator, so that a picture depends on its seed and not on the batch that it was made in.
"""

from eval.qwen.samplers.bridge import BridgeSampler
from eval.qwen.samplers.flow import FlowSampler, guide
from eval.qwen.samplers.sampler import Keep, OnStep, Sampler, Velocity, describe_sampler

__all__ = [
    "BridgeSampler",
    "FlowSampler",
    "Keep",
    "OnStep",
    "Sampler",
    "Velocity",
    "describe_sampler",
    "guide",
]
