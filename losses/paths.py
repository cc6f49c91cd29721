"""Paths from a start (sigma = 1) to a target (sigma = 0), and the velocities that lead along them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["displacement", "drift"]


@dataclass
class PathSample:
    """A point on the path and what the denoiser should predict there.

    Attributes:
        latents: x at sigma, (B, C, h, w).
        velocity: the regression target, (B, C, h, w).
        weight: weight of the sample's squared error, (B,).
    """

    latents: Tensor
    velocity: Tensor
    weight: Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), on the device and in the dtype of `like`, to broadcast over it."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


class FlowPath:
    """x = sigma * noise + (1 - sigma) * target; velocity = noise - target (rectified flow, Liu et al., arXiv 2209.03003)."""

    def sample(self, start: Tensor, target: Tensor, sigma: Tensor) -> PathSample:
        """`start` is the noise itself."""
        s = per_sample(sigma, target)
        return PathSample(s * start + (1 - s) * target, start - target, torch.ones_like(s.flatten()))


class BridgePath:
    """A Brownian bridge from the start to the target.

        x = s * start + (1 - s) * target + bridge_noise * sqrt(s (1 - s)) * noise

    (Latent Bridge Matching, Chadebec et al., arXiv 2503.07535, equation 5 with s = 1 - t.) At s = 1, x is the start exactly.

    Args:
        bridge_noise: the paper's sigma, >= 0; about 0.005 to 0.05 in normalised latents.
        prediction: "displacement" regresses start - target, right for bridge_noise <= 0.01; "drift" regresses
            (x - target) / s, the bridge's own drift (equation 4), with the error divided by alpha^2, where
            alpha^2 = 1 + bridge_noise^2 (1 - s) D / (s |start - target|^2) and D is the number of elements, so that a
            small s does not dominate (ViBT, arXiv 2511.23199).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, bridge_noise: float = 0.005, prediction: Prediction = "displacement"):
        if not 0 <= bridge_noise < math.inf:
            raise ValueError(f"bridge_noise must be 0 or more, got {bridge_noise}")
        if prediction not in ("displacement", "drift"):
            raise ValueError(f"prediction must be 'displacement' or 'drift', got {prediction!r}")
        self.bridge_noise = bridge_noise
        self.prediction = prediction

    def sample(
        self, start: Tensor, target: Tensor, sigma: Tensor, noise: Tensor, distance: Tensor | None = None
    ) -> PathSample:
        """A point on the bridge. With "drift", sigma must be above 0.

        Args:
            start, target, noise: (B, C, h, w).
            sigma: (B,).
            distance: mean squared distance of start and target, (B,), where elements are weighted as the error will be;
                unweighted by default. alpha^2 is made of it.
        """
        s = per_sample(sigma, target)
        displacement = start - target
        latents = s * start + (1 - s) * target + self.bridge_noise * (s * (1 - s)).sqrt() * noise
        if self.prediction == "displacement":
            return PathSample(latents, displacement, torch.ones_like(s.flatten()))
        if distance is None:
            distance = displacement.square().flatten(1).mean(1)
        alpha_squared = 1 + self.bridge_noise**2 * (1 - s.flatten()) / (s.flatten() * distance.clamp_min(1e-12))
        # (latents - target) / s without the difference of nearly equal numbers at a small s
        drift = displacement + self.bridge_noise * ((1 - s) / s).sqrt() * noise
        return PathSample(latents, drift, 1 / alpha_squared)


def predict_target(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The target that a velocity points at, x - s v, (B, C, h, w) (LBM, equation 6).

    It is exact for the drift; with "displacement" it keeps the bridge's noise.
    """
    return latents - per_sample(sigma, latents) * velocity
