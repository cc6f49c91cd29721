"""The photographs that ship inside scikit-image and scikit-learn: the only real pictures this project needs offline.

The split is by photograph, never by crop: what is held out is seen by no trained part, neither the tiny VAE,
nor the tiny DiT, nor the demo's LoRA. Settings are chosen on photographs of their own (`SELECTION`), which the LoRA is then
not trained on. docs/training.md says which of the demo's settings are older than that and were chosen on what is held out.
"""

import random
from pathlib import Path

import skimage
import sklearn
from PIL import Image

SKIMAGE_DATA = Path(skimage.__file__).parent / "data"
SKLEARN_DATA = Path(sklearn.__file__).parent / "datasets" / "images"

TRAIN = [
    SKIMAGE_DATA / "astronaut.png",
    SKIMAGE_DATA / "hubble_deep_field.jpg",
    SKIMAGE_DATA / "ihc.png",
    SKIMAGE_DATA / "motorcycle_left.png",
    SKIMAGE_DATA / "motorcycle_right.png",
    SKIMAGE_DATA / "retina.jpg",
    SKIMAGE_DATA / "rocket.jpg",
    SKIMAGE_DATA / "brick.png",
    SKIMAGE_DATA / "camera.png",
    SKIMAGE_DATA / "coins.png",
    SKIMAGE_DATA / "grass.png",
    SKIMAGE_DATA / "gravel.png",
    SKLEARN_DATA / "china.jpg",
    SKLEARN_DATA / "flower.jpg",
]
HELD_OUT = [SKIMAGE_DATA / "chelsea.png", SKIMAGE_DATA / "coffee.png"]
SELECTION = [SKIMAGE_DATA / "astronaut.png", SKLEARN_DATA / "flower.jpg"]
"""Of `TRAIN`: kept back from the LoRA, and validated on, while settings are chosen."""


def load(path: Path) -> Image.Image:
    """Opens a photograph as RGB."""
    return Image.open(path).convert("RGB")


def random_crop(photograph: Image.Image, size: int, rng: random.Random, smallest: float = 0.35) -> Image.Image:
    """Cuts a random square of `smallest` to 1.0 times the short side and resizes it to `size` x `size` pixels."""
    side = max(min(photograph.size), 1)
    side = rng.randint(max(int(side * smallest), min(side, size)), side)
    left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
    crop = photograph.crop((left, top, left + side, top + side))
    return crop.resize((size, size), Image.Resampling.LANCZOS)
