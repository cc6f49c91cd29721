"""Making a picture again, or with one setting changed, from what its file says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.errors import InputError
from data_prep.geometry import Geometry, Size
from data_prep.images import file_digest
from eval.metadata import adapter_file
from eval.model.placement import WeightsName
from eval.places import find_adapter
from eval.provenance import pixel_digest, read_png
from eval.request import WITH_STRENGTH, AdapterUse, Control, Focus


@dataclass(frozen=True)
class Repeat:
    """How a picture was made."""

    path: Path
    settings: dict[str, Any]
    knobs: dict[str, Any]
    """Fields of `EditRequest`."""

    @property
    def model(self) -> str:
        """The base model's place."""
        return self.settings["model"]

    @property
    def geometry(self) -> Geometry:
        """The sizes of images."""
        return Geometry(**self.settings["geometry"])

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return self.settings["dtype"]

    @property
    def weights(self) -> WeightsName:
        """How the transformer's were rounded."""
        return self.settings.get("weights", "full")

    def check_gguf(self, gguf: Path | None) -> None:
        """Refuses another GGUF file than the one that the transformer was read from.

        Raises:
            InputError: another file, one too many, or none.
        """
        if (file_digest(gguf) if gguf else None) != self.settings.get("gguf"):
            raise InputError(f"{self.path} was made with another --gguf, or none: give the same")

    def check_images(self, images: Sequence[Image.Image], mask: Image.Image | None) -> None:
        """Refuses other images than those that the picture was made of.

        Raises:
            InputError: the number or the pixels differ.
        """
        wanted, names = self.settings["image_digests"], ", ".join(each["name"] for each in self.settings["images"])
        if [pixel_digest(each) for each in images] != wanted:
            raise InputError(f"{self.path} was made of {len(wanted)} other image(s) than --image: give {names}")
        if (pixel_digest(mask) if mask else None) != self.settings.get("mask_digest"):
            raise InputError(f"{self.path} was made with another --mask, or none: it was made of {names}")

    def check_model(self, settings: Mapping[str, Any]) -> None:
        """Refuses what another model made.

        Raises:
            InputError: the model at the same place has other contents now.
        """
        if settings["model_fingerprint"] != self.settings["model_fingerprint"]:
            raise InputError(f"{self.path} was made with another model than {settings['model']}: nothing was written")


def read_repeat(path: Path, changes: Mapping[str, Any]) -> Repeat:
    """Reads a picture's settings.

    Args:
        path: a PNG that was written here.
        changes: fields of `EditRequest` that take the place of the picture's.

    Raises:
        InputError: it says nothing, or its adapter is gone or another.
    """
    settings = read_png(path)
    try:
        knobs = _knobs(settings, changes)
        if "adapters" not in changes:
            knobs["adapters"] = tuple(_adapter(path, each) for each in settings["adapters"])
        made = Repeat(path, settings, knobs)
        _ = made.model, made.geometry, made.dtype, settings["image_digests"], settings["model_fingerprint"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} was written by another version, its settings lack {error}") from None
    return made


def _knobs(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the request that give these settings, and no field that its mode does not take."""
    sampler = settings["sampler"]
    knobs: dict[str, Any] = {name: settings[name] for name in ("mode", "prompt", "seed", "steps")}
    knobs |= {name: settings[name] for name in ("negative_prompt", "feather") if name in settings}
    knobs["sampler"] = sampler.get("kind")
    knobs["cfg_scale"] = sampler.get("cfg_scale", sampler.get("flow", {}).get("cfg_scale"))
    knobs["strength"] = sampler.get("strength") if settings["mode"] in WITH_STRENGTH else None
    knobs["focus"] = Focus(**settings["focus"]) if "focus" in settings else None
    knobs["controls"] = tuple(Control(**each) for each in settings.get("controls", ()))
    knobs["size"] = None if "aspect" in changes else Size(settings["height"], settings["width"])
    return {**knobs, **changes}


def _adapter(path: Path, used: Mapping[str, Any]) -> AdapterUse:
    place = find_adapter(used["path"])
    if file_digest(adapter_file(place)) != used["digest"]:
        raise InputError(f"{path} was made with another adapter than {place} is now: name it with --adapter")
    return AdapterUse(place, used["weight"])
