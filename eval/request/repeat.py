"""Making a picture again, or with one setting changed, from what its file says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import Size, make_geometry
from eval.request.knobs import AdapterUse, Control, Focus, ModeName
from eval.request.metadata import extra_digest, read_metadata, stored_digest
from eval.request.options import ModelOptions, PlaceOptions
from eval.request.provenance import pixel_digest, read_png
from eval.request.request import BRIDGES, DEFAULT_STRENGTHS, KNOBS, MASKED, WITH_STRENGTH
from train.model.adapter_files import adapter_file
from train.record.lookup import find_adapter


@dataclass(frozen=True)
class Repeat:
    """How a picture was made."""

    path: Path
    settings: dict[str, Any]
    knobs: dict[str, Any]
    """Fields of `EditRequest`."""

    @property
    def depth_model(self) -> str | None:
        """The place of the one that the picture's depth map was made by, if it had any."""
        return self.settings["depth_model"]["path"] if "depth_model" in self.settings else None

    def completed(self, model: ModelOptions, place: PlaceOptions) -> tuple[ModelOptions, PlaceOptions]:
        """Options, where they say nothing as the picture was made.

        Raises:
            InputError: another GGUF file than the one that its transformer was read from.
        """
        self.check_gguf(place.gguf)
        settings = self.settings
        model = replace(
            model, model=model.model or settings["model"], depth_model=model.depth_model or self.depth_model
        )
        words: dict[str, Any] = {name: getattr(place, name) or settings.get(name) for name in ("dtype", "weights")}
        flags = {name: getattr(place, name) or settings.get(name, False) for name in ("vae_tiling", "compile")}
        return model, replace(place, **words, **flags)

    def check_gguf(self, gguf: Path | None) -> None:
        """Refuses another GGUF file than the one that the transformer was read from.

        Raises:
            InputError: another file, one too many, or none.
        """
        if (stored_digest(gguf) if gguf else None) != self.settings.get("gguf"):
            raise InputError(f"{self.path} was made with another GGUF file, or with none: give the same --gguf")

    def check_images(self, images: Sequence[Image.Image], mask: Image.Image | None) -> None:
        """Refuses other images than those that the picture was made of; a mask is new where the mode is.

        Raises:
            InputError: the number or the pixels differ.
        """
        wanted, names = self.settings["image_digests"], ", ".join(each["name"] for each in self.settings["images"])
        if [pixel_digest(each) for each in images] != wanted:
            raise InputError(
                f"{self.path} was made from {len(wanted)} image(s), which --image does not match: give {names}"
            )
        mode, before = self.knobs["mode"], self.settings.get("mask_digest")
        if mode != self.settings["mode"] and not (before and mode in MASKED):
            return  # the request knows whether its mode needs one
        if (pixel_digest(mask) if mask else None) != before:
            raise InputError(f"{self.path} was made with another --mask, or with none: it was made from {names}")

    def check_models(self, identity: Mapping[str, str], folder: Path) -> None:
        """Refuses what another model would make.

        Args:
            identity: the fingerprints of the models that are to make it, as `BaseEditor.identity` gives them.
            folder: folder of the base model.

        Raises:
            InputError: a model has other contents than the one that the picture was made with.
        """
        if identity["model"] != self.settings["model_fingerprint"]:
            raise InputError(
                f"{self.path} was made with a different model from the one in {folder} now: name it with --model"
            )
        before = self.settings.get("depth_model")
        if before and identity.get("depth_model", before["fingerprint"]) != before["fingerprint"]:
            raise InputError(
                f"{self.path} was made with another depth model, which was at {before['path']}: name it with --depth-model"
            )


def read_repeat(path: Path, changes: Mapping[str, Any]) -> Repeat:
    """Reads a picture's settings.

    Args:
        path: a PNG that was written here.
        changes: fields of `EditRequest` that take the place of the picture's.

    Raises:
        InputError: it says nothing, its adapter is gone or another, or its source was a composite.
    """
    settings = read_png(path)
    if "overlay" in settings:
        raise InputError(
            f"{path} was made from a table's row with an overlay, and the image under edit was not saved: make it "
            "again with --csv"
        )
    try:
        knobs = _knobs(path, settings, changes)
        if "adapters" not in changes:
            knobs["adapters"] = tuple(_adapter(path, each) for each in settings["adapters"])
        made = Repeat(path, settings, knobs)
        _ = [settings[name] for name in ("model", "dtype", "image_digests", "model_fingerprint")]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} was written by another version of this program: its settings lack {error}") from None
    return made


def _knobs(path: Path, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the request that give these settings, and no field that its mode or its adapter does not take.

    Raises:
        InputError: the strength would mean something else now.
    """
    sampler, mode = settings["sampler"], changes.get("mode", settings["mode"])
    knobs: dict[str, Any] = {name: settings[name] for name in ("prompt", "seed", "steps")}
    knobs |= {name: settings[name] for name in ("negative_prompt", "feather") if name in settings}
    knobs["sampler"] = sampler.get("kind")
    knobs["cfg_scale"] = sampler.get("cfg_scale", sampler.get("flow", {}).get("cfg_scale"))
    knobs["strength"] = sampler.get("strength") if settings["mode"] in WITH_STRENGTH else None
    knobs["focus"] = Focus(**settings["focus"]) if "focus" in settings else None
    knobs["controls"] = tuple(Control(**each) for each in settings.get("controls", ()))
    follows = "aspect" in changes or "computed_size" in settings or settings.get("original_size")
    knobs["size"] = (
        None if follows else Size(settings["height"], settings["width"])
    )  # else from the image and the geometry
    geometry = {} if "sizing" in changes else {"geometry": make_geometry(settings["geometry"])}
    for name in {*_left_by_mode(settings["mode"], mode), *_left_by_adapter(settings, changes)}:
        knobs.pop(name, None)
    if knobs.get("strength") not in (None, 1) and "strength" not in changes and not _is_share_of_noise(sampler):
        raise InputError(
            f"the strength of {path}, {knobs['strength']:g}, counted steps, as strengths did then, and would give another "
            "picture now: give --strength, the share of noise that the edit starts from"
        )
    return {"mode": mode, "prompt": "", **geometry, **knobs, **changes}


def _is_share_of_noise(sampler: Mapping[str, Any]) -> bool:
    """Whether a sampler's strength is what it is now; those of Qwen-Image-Edit have named their solver since."""
    return "solver" in sampler.get("flow", sampler) or sampler.get("name") not in ("FlowSampler", "InversionSampler")


def _left_by_mode(before: ModeName, mode: ModeName) -> set[str]:
    """Settings of one mode that another does not take, or takes for something else."""
    left = {each.field for each in KNOBS if mode not in each.knob.modes}
    if mode == "variation":
        left.add("prompt")
    if DEFAULT_STRENGTHS.get(mode) != DEFAULT_STRENGTHS.get(before):
        left.add("strength")
    if mode != before and {mode, before} & {"turbo", "invert"}:
        left |= {"steps", "sampler", "cfg_scale"}  # theirs are of another kind
    return left if mode != before else set()


def _left_by_adapter(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> set[str]:
    """Settings of one adapter that another, if there is another now, does not take or decides by itself."""
    first = next((use for use in changes.get("adapters", ()) if use.weight != 0), None)
    used = next((each for each in settings["adapters"] if each["weight"] != 0), None)
    if first is None or (used and stored_digest(adapter_file(first.path)) == used["digest"]):
        return set()
    before = settings["sampler"].get("kind")
    if (read_metadata(first.path).get("objective") == "lbm") != (before in BRIDGES):
        return {"sampler", "cfg_scale", "steps", "strength"}
    return {"sampler"} if before in ("bridge", "bridge-white") else set()


def _adapter(path: Path, used: Mapping[str, Any]) -> AdapterUse:
    place = find_adapter(used["path"])
    now = {"digest": stored_digest(adapter_file(place)), **extra_digest(place)}
    if any(now.get(name) != used.get(name) for name in ("digest", "extra_digest")):
        raise InputError(f"{path} was made with a different adapter from {place} as it is now: name it with --adapter")
    return AdapterUse(place, used["weight"])
