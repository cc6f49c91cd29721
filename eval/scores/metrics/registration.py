"""Whether the picture is still where the source was: the shift and the zoom of its background against the source's.

This model family is known to move and to zoom what it should have left alone. How it is measured:
data_prep/check/measures/drift.py.
"""

from PIL import Image
from torch import Tensor

from data_prep.check.measures.drift import Drift, measure_drift
from data_prep.model.geometry import to_image
from eval.scores.metrics.metric import SHIFT, ZOOM, Example, Scores


class Registration:
    """Shift and zoom of the background (of everything, in a row without a mask) against the source."""

    def __call__(self, example: Example) -> Scores:
        return registration_scores(example.source, example.prediction, example.background)


def registration_scores(source: Tensor, picture: Tensor, background: Tensor | None) -> Scores:
    """The drift of a picture (3, H, W) in [0, 1] against the source; without shift and zoom if they cannot be compared."""
    mask = None if background is None else Image.fromarray(background.numpy().astype("uint8") * 255)
    return drift_scores(measure_drift(to_image(source * 2 - 1), to_image(picture * 2 - 1), mask))


def drift_scores(drift: Drift | None) -> Scores:
    """What a measured drift counts as."""
    if drift is None:
        return {"drift_unknown": 1.0}
    drifted = drift.shift > SHIFT or abs(drift.zoom) > ZOOM
    return {
        "drift_shift": drift.shift,
        "drift_zoom": 100 * abs(drift.zoom),
        "drifted": float(drifted),
        "drift_unknown": 0.0,
    }
