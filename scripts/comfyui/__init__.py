"""ComfyUI nodes for adapters that were trained with Latent Bridge Matching. The folder needs nothing else of this project."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
