"""FID: whether a set of pictures is distributed as the targets are."""

from collections import Counter
from pathlib import Path
from zipfile import BadZipFile

import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities.imports import _TORCH_FIDELITY_AVAILABLE

from data_prep.model.geometry import Size, stretch
from eval.scores.metrics.features import Features
from eval.scores.metrics.metric import Example, Scores, Unavailable, first_line
from eval.scores.metrics.sources import Places

INCEPTION_SIZE = Size(299, 299)


class Exported(nn.Module):
    """Features from a program of `torch.export`: RGB pixels in 0…255 (uint8, (1, 3, H, W)) -> (1, D)."""

    def __init__(self, file: Path):
        super().__init__()
        program = torch.export.load(file)
        if program.example_inputs is None:
            raise ValueError("it has no example input, which says the size of its pictures")
        example = program.example_inputs[0][0]
        self.size = Size(*example.shape[-2:])
        self.network = program.module()
        self.num_features: int = self.network(example).shape[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (N, D) of pixels (N, 3, H, W)."""
        return torch.cat([self.network(each[None]) for each in pixels])


class Fid:
    """Fréchet distance between the Gaussians that fit the features of the pictures and of the targets.

    The features are Inception's if the file is its weights (`.pth`, as torch-fidelity has them), or what a program of
    `torch.export` makes (`.pt2`). With no more pictures than features the covariance has no full rank, and there is no figure.
    """

    def __init__(self, places: Places):
        if places.fid is None:
            raise Unavailable("no features: give Inception's weights (.pth) or an exported program (.pt2) with --fid")
        if not places.fid.is_file():
            raise Unavailable(f"there is no file {places.fid}")
        self.device = places.device
        try:
            network, self.size = _inception(places.fid) if places.fid.suffix == ".pth" else _exported(places.fid)
            self.network = network.to(self.device)
        except (OSError, ValueError, RuntimeError, KeyError, BadZipFile) as error:
            raise Unavailable(f"{places.fid} cannot be loaded: {first_line(error)}") from error
        self.features = Features(self._embed)
        self.sets: dict[str, FrechetInceptionDistance] = {}
        self.counts: Counter[str] = Counter()

    def add(self, example: Example) -> None:
        """Takes a picture and its target into the method's sets."""
        if example.method not in self.sets:
            self.sets[example.method] = FrechetInceptionDistance(_Given(len(self.features(example, "target"))))
        self.counts[example.method] += 1
        self.sets[example.method].update(self.features(example, "target")[None], real=True)
        self.sets[example.method].update(self.features(example, "prediction")[None], real=False)

    def result(self, method: str) -> Scores:
        """The method's FID.

        Raises:
            Unavailable: there are no more pictures than features.
        """
        fid, count = self.sets[method], self.counts[method]
        num_features = fid.real_features_sum.shape[-1]
        if count <= num_features:
            raise Unavailable(f"{count} pictures are not enough: there must be more than the {num_features} features")
        return {"fid": float(fid.compute())}

    def _embed(self, picture: Image.Image) -> Tensor:
        """Features (D,)."""
        data = torch.frombuffer(bytearray(stretch(picture, self.size).tobytes()), dtype=torch.uint8)
        return self.network(data.view(*self.size, 3).permute(2, 0, 1)[None].to(self.device))[0]


class _Given(nn.Module):
    """In the place of a network, for features (N, D) that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The same."""
        return features


def _inception(file: Path) -> tuple[nn.Module, Size]:
    if not _TORCH_FIDELITY_AVAILABLE:
        raise Unavailable("Inception needs the package torch-fidelity: install the extra “fid”")
    network = FrechetInceptionDistance(feature_extractor_weights_path=str(file)).inception
    assert isinstance(network, nn.Module)
    return network, INCEPTION_SIZE


def _exported(file: Path) -> tuple[nn.Module, Size]:
    network = Exported(file)
    return network, network.size
