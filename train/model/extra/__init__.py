"""What is trained beside LoRA: modules of the transformer in full, and added modules that see a picture's places.

A module of your own is a subclass of `ExtraModule`. All of it is in `extra_modules.safetensors`, beside the adapter's file, which
stays LoRA alone and loadable everywhere.
"""

from losses.batch import Scene
from train.model.extra.modules import ExtraModule, SpatialTemporalEncoder

__all__ = ["ExtraModule", "Scene", "SpatialTemporalEncoder"]
