"""What the published editions of Qwen-Image-Edit were taught: how an instruction is put, and how large images are shown."""

from dataclasses import dataclass

from data_prep.errors import InputError
from data_prep.rows.rows import MAX_SOURCES

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Edition:
    """One of them, told by the pipeline's class in `model_index.json`."""

    pipeline: str
    picture: str
    """What stands for an image in the template, with its number, from 1, in the place of {}."""
    vision_pixels: int
    """Area at which the text encoder was shown images, in pixels."""
    max_images: int
    """That an instruction may speak of."""


FIRST = Edition("QwenImageEditPipeline", IMAGE_TOKENS, 1024 * 1024, 1)
"""Qwen-Image-Edit of August 2025."""
PLUS = Edition("QwenImageEditPlusPipeline", "Picture {}: " + IMAGE_TOKENS, 384 * 384, MAX_SOURCES)
"""2509, 2511, and what was made of them."""
EDITIONS = {edition.pipeline: edition for edition in (FIRST, PLUS)}


def edition_of(pipeline: str, where: object) -> Edition:
    """The edition of a pipeline's class.

    Args:
        where: the model, for the message.

    Raises:
        InputError: it is another pipeline.
    """
    if pipeline not in EDITIONS:
        raise InputError(
            f"{where} is a {pipeline}, which cannot be used here; those that can are {', '.join(EDITIONS)}"
        )
    return EDITIONS[pipeline]
