"""DINO: whether the picture shows the same thing as the target, and has the same structure as the source."""

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize
from transformers import AutoImageProcessor, AutoModel

from eval.scores.metrics.features import Features, cosine
from eval.scores.metrics.metric import Example, Scores, Unavailable
from eval.scores.metrics.sources import Places

KEYS = ("k_proj", "key")
"""What transformers calls the layer that makes an attention's keys."""


class Dino:
    """Similarity to the target by the class token, and PIE-Bench's structure distance to the source.

    Structure distance: the mean square difference of the cosine similarities of all tokens' keys with each other, in the last
    attention layer (Tumanyan et al. 2022, Splicing ViT Features, arXiv 2201.00424), times 1000.
    """

    def __init__(self, places: Places):
        self.device = places.device
        self.model: nn.Module = (
            places.pretrained(AutoModel.from_pretrained, places.dino, "--dino").to(self.device).eval()
        )
        self.processor = places.pretrained(AutoImageProcessor.from_pretrained, places.dino, "--dino")
        layers = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] in KEYS]
        if not layers:
            raise Unavailable(f"{places.dino} has no layer of keys ({' or '.join(KEYS)}): use a ViT of DINO or DINOv2")
        self._keys: Tensor | None = None
        layers[-1].register_forward_hook(self._remember)
        self.features = Features(self._image)

    def __call__(self, example: Example) -> Scores:
        picture, target, source = (self.features(example, role) for role in ("prediction", "target", "source"))
        scores = {"structure": 1000 * float(mse_loss(self_similarity(picture[1:]), self_similarity(source[1:])))}
        similar = cosine(picture[0], target[0])
        return scores if similar is None else scores | {"dino": similar}

    def _remember(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._keys = output

    def _image(self, picture: Image.Image) -> Tensor:
        """The class token, then every token's key, (1 + N, D)."""
        inputs = self.processor(images=picture, return_tensors="pt").to(self.device)
        token = self.model(**inputs).last_hidden_state[0, :1]
        assert self._keys is not None
        return torch.cat([token, self._keys[0]])


def self_similarity(keys: Tensor) -> Tensor:
    """Cosine similarities of keys (N, D) with each other, (N, N)."""
    unit = normalize(keys.double(), dim=1)
    return unit @ unit.T
