"""CLIP: whether the picture shows what the instruction says, changes in its direction, and looks like the target."""

from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from eval.scores.metrics.features import Features, cosine
from eval.scores.metrics.metric import NEUTRAL, Example, Scores
from eval.scores.metrics.sources import Places


class Clip:
    """CLIPScore, two directional similarities, and the similarity to the target.

    A row has an instruction and no captions. CLIPScore therefore holds the picture against the instruction; the direction of the
    text is that from `NEUTRAL` to the instruction. The direction from source to target needs no text at all.
    """

    def __init__(self, places: Places):
        self.device = places.device
        self.model: CLIPModel = (
            places.pretrained(CLIPModel.from_pretrained, places.clip, "--clip").to(self.device).eval()
        )
        self.processor: Any = places.pretrained(CLIPProcessor.from_pretrained, places.clip, "--clip")
        self.features = Features(self._image)
        self._text = lru_cache(maxsize=1024)(self._encode_text)

    def __call__(self, example: Example) -> Scores:
        picture, target, source = (self.features(example, role) for role in ("prediction", "target", "source"))
        instruction = self._text(example.prompt)
        similar = cosine(picture, instruction)
        scores = {
            "clip_score": None if similar is None else 100 * max(similar, 0.0),
            "clip_direction": cosine(picture - source, instruction - self._text(NEUTRAL)),
            "clip_direction_target": cosine(picture - source, target - source),
            "clip_i": cosine(picture, target),
        }
        return {name: value for name, value in scores.items() if value is not None}

    def _image(self, picture: Image.Image) -> Tensor:
        inputs = self.processor(images=picture, return_tensors="pt").to(self.device)
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def _encode_text(self, text: str) -> Tensor:
        inputs = self.processor(text=text, return_tensors="pt", truncation=True).to(self.device)
        return _unit(self.model.get_text_features(**inputs)).float().cpu()


def _unit(features: object) -> Tensor:
    """One vector of length 1, (D,)."""
    pooled = getattr(features, "pooler_output", features)
    assert isinstance(pooled, Tensor)
    return pooled[0] / pooled[0].norm()
