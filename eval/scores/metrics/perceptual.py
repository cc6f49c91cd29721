"""LPIPS and DISTS: distances between the features of networks that were trained to see.

Their heads come with torchmetrics. The backbones are torchvision's, from torch's hub folder.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image.dists import DISTSNetwork
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from eval.scores.metrics.metric import Example, Scores
from eval.scores.metrics.sources import Places


def _file(weights: AlexNet_Weights | SqueezeNet1_1_Weights | VGG16_Weights) -> str:
    return weights.url.rpartition("/")[2]


class Lpips:
    """LPIPS with AlexNet, against the target."""

    def __init__(self, places: Places):
        with places.hub_checkpoint(_file(AlexNet_Weights.DEFAULT)):
            self.distance = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(places.device)

    def __call__(self, example: Example) -> Scores:
        return {"lpips": _lpips(self.distance, example.prediction, example.target)}


class LpipsPie:
    """PIE-Bench's LPIPS of the background: SqueezeNet, both pictures blackened outside it, against the source."""

    def __init__(self, places: Places):
        with places.hub_checkpoint(_file(SqueezeNet1_1_Weights.DEFAULT)):
            self.distance = LearnedPerceptualImagePatchSimilarity("squeeze", normalize=True).to(places.device)

    def __call__(self, example: Example) -> Scores:
        region = example.background
        if region is None or not region.any():
            return {}
        return {"lpips_background_pie": _lpips(self.distance, example.prediction * region, example.source * region)}


class Dists:
    """DISTS, against the target."""

    def __init__(self, places: Places):
        with places.hub_checkpoint(_file(VGG16_Weights.DEFAULT)):
            self.network = DISTSNetwork().to(places.device).eval()
        self.device = places.device

    def __call__(self, example: Example) -> Scores:
        pictures = (pixels[None].to(self.device) for pixels in (example.prediction, example.target))
        with torch.no_grad():
            return {"dists": float(self.network(*pictures))}


def _lpips(distance: LearnedPerceptualImagePatchSimilarity, one: Tensor, other: Tensor) -> float:
    with torch.no_grad():
        value = float(distance(*(pixels[None].to(distance.device) for pixels in (one, other))))
    distance.reset()  # it would keep the mean of all calls
    return value
