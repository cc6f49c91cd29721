"""What an adapter's file says of itself, in the header of its safetensors file."""

import json
from dataclasses import dataclass, fields

from safetensors import safe_open

from .sizes import Geometry

PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Settings:
    """What the nodes need of it."""

    objective: str
    """`lbm` for a bridge, `flow` for flow matching."""
    geometry: Geometry
    sigmas: tuple[float, ...] | None
    """Where a bridge was trained, if that is at a few alone."""
    notes: tuple[str, ...]
    """Sentences about what the file holds."""

    @property
    def text(self):
        """All of it, for reading."""
        sizes = self.geometry
        lines = [f"objective: {self.objective}", f"largest result: {sizes.max_pixels:,} pixels"]
        lines += [f"the text encoder sees {sizes.vision_pixels:,} pixels of each picture"]
        if self.sigmas:
            lines.append(f"trained at sigma {', '.join(f'{sigma:g}' for sigma in self.sigmas)}")
        return "\n".join([*lines, *self.notes])


def read_settings(path, name):
    """Reads the header, and no weights.

    Args:
        path: of the file.
        name: as it is called in messages.

    Raises:
        ValueError: it does not say what it is: it was trained by another program, or another program saved it anew; or it says
            what these nodes do not know.
    """
    with safe_open(path, framework="pt") as file:
        metadata, keys = file.metadata() or {}, list(file.keys())
    if "objective" not in metadata or "geometry" not in metadata:
        raise ValueError(
            f"{name} does not say how it was trained: its header has no objective and geometry. Take the file that the training "
            "wrote; programs that save it anew drop the header"
        )
    if metadata.get("base_pipeline") == "QwenImageEditPipeline":
        raise ValueError(
            f"{name} was trained on the first Qwen-Image-Edit, to which pictures are named otherwise: these nodes are for 2509, "
            "2511 and what was made of them"
        )
    sizes = json.loads(metadata["geometry"])
    if unknown := sizes.keys() - {each.name for each in fields(Geometry)}:
        raise ValueError(
            f"{name} was trained by a newer version, with {', '.join(sorted(unknown))}: update these nodes"
        )
    sigmas = json.loads(metadata["sigmas"]) if "sigmas" in metadata else None
    return Settings(
        objective=metadata["objective"],
        geometry=Geometry(**sizes),
        sigmas=tuple(sigmas) if sigmas else None,
        notes=tuple(_notes(metadata, keys)),
    )


def _notes(metadata, keys):
    kind = "LoKr" if any(".lokr_w" in key for key in keys) else "LoRA"
    modules = {
        key.removeprefix(PREFIX).split(".lora_")[0].split(".lokr_")[0] for key in keys if not key.endswith(".alpha")
    }
    yield f"{kind} of {len(modules)} modules"
    if metadata.get("base_model"):
        yield f"trained on {metadata['base_model']}"
    if metadata.get("extra_modules"):
        yield "It was trained with more than LoRA (extra_modules.safetensors), which ComfyUI cannot load: results differ."
    if metadata.get("frozen"):
        names = ", ".join(json.loads(metadata["frozen"]).values())
        yield f"It was trained over {names}: load that before it."
