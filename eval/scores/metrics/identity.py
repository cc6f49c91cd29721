"""Whether a face is still the same person's."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.scores.metrics.features import Features
from eval.scores.metrics.metric import Example, Scores, Unavailable, first_line
from eval.scores.metrics.sources import Places

LANDMARKS, EMBEDDING = "shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"
PACKAGE = "face_recognition_models"
EMBEDDED = 128
"""Numbers of a face."""
SIDE = 512
"""Smaller pictures are enlarged to it: the detector looks for faces of 80 pixels and more."""


class Identity:
    """The distance of the largest face's embedding (128 numbers) from the source's; below 0.6 it is the same person.

    A row whose source shows no face has no score; one whose face is not found again counts in `face_kept` alone.
    """

    def __init__(self, places: Places):
        folder = places.face or _package_folder()
        for name in (LANDMARKS, EMBEDDING):
            if not (folder / name).is_file():
                raise Unavailable(f"{name} is not in {folder}: give dlib's models with --face")
        try:
            dlib: Any = importlib.import_module("dlib")
        except ImportError as error:
            raise Unavailable(f"dlib is not installed ({first_line(error)}): install the extra “identity”") from error
        self.features = Features(self._embed)
        self.detector: Any = dlib.get_frontal_face_detector()
        try:
            self.landmarks = dlib.shape_predictor(str(folder / LANDMARKS))
            self.embedding = dlib.face_recognition_model_v1(str(folder / EMBEDDING))
        except RuntimeError as error:
            raise Unavailable(f"dlib cannot read the models in {folder}: {first_line(error)}") from error

    def __call__(self, example: Example) -> Scores:
        before = self.features(example, "source")
        if not len(before):
            return {}
        after = self.features(example, "prediction")
        if not len(after):
            return {"face_kept": 0.0}
        return {"face_kept": 1.0, "identity": float((after - before[0]).norm(dim=1).min())}

    def _embed(self, picture: Image.Image) -> Tensor:
        """The embeddings of the faces in a picture, (N, 128), the largest first."""
        scale = max(1.0, SIDE / max(picture.size))
        size = round(picture.width * scale), round(picture.height * scale)
        array = np.array(picture.resize(size, Image.Resampling.BICUBIC))
        found = sorted(self.detector(array), key=lambda face: -face.area())
        shapes = (self.landmarks(array, face) for face in found)
        found = [list(self.embedding.compute_face_descriptor(array, shape)) for shape in shapes]
        return torch.tensor(found).reshape(len(found), EMBEDDED)


def _package_folder() -> Path:
    """Where the package that carries dlib's models has them; it is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise Unavailable(f"no models: install the extra “identity”, or give the folder of {EMBEDDING} with --face")
    return Path(found.origin).parent / "models"
