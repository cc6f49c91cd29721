"""What each of these base models can be asked, and its defaults. Nothing heavy is imported here."""

from dataclasses import dataclass

from data_prep.model.geometry import Geometry
from eval.request.knobs import ModeName
from eval.request.request import Abilities

GENERAL: tuple[ModeName, ...] = ("img2img", "variation", "inpaint", "focus")
MASKED_ONLY: tuple[ModeName, ...] = ("inpaint", "focus")


@dataclass(frozen=True)
class Base:
    """A base model as its authors mean it to be sampled."""

    abilities: Abilities
    steps: int
    cfg_scale: float
    geometry: Geometry

    @property
    def name(self) -> str:
        """As in `Abilities`."""
        return self.abilities.base


def _base(
    name: str, modes: tuple[ModeName, ...], steps: int, cfg_scale: float, max_pixels: int, max_images: int = 1
) -> Base:
    return Base(Abilities(name, modes, max_images), steps, cfg_scale, Geometry(max_pixels))


BASES = {
    base.name: base
    for base in (
        _base("flux-kontext", ("edit",), 28, 2.5, 1024**2),
        _base("sd15", GENERAL, 30, 7.5, 512**2),
        _base("sd15-inpaint", MASKED_ONLY, 30, 7.5, 512**2),
        _base("sdxl", GENERAL, 30, 5.0, 1024**2),
        _base("sdxl-inpaint", MASKED_ONLY, 30, 5.0, 1024**2),
    )
}
"""By name. The `-inpaint` ones are those whose UNet reads a mask and the masked picture beside the latents."""
