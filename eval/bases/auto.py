"""Which base model a folder or a hub id holds, and the editor for it.

An editor's libraries are imported when it is opened: those of one base cost seconds, and the others do without.
"""

import json
from pathlib import Path

from data_prep.errors import InputError
from data_prep.model.directory import INDEX, ModelDirectory
from data_prep.model.editions import EDITIONS
from data_prep.model.geometry import Geometry
from data_prep.model.hub_files import fetch
from eval.request.base import BaseEditor
from eval.request.lookup import find_model
from eval.request.options import ModelOptions
from eval.request.placement import Placement, make_placement
from eval.request.sizes import NO_LIMITS, SizeLimits

QWEN = "qwen-image-edit"
CLASSES = {
    **dict.fromkeys(EDITIONS, QWEN),
    "FluxKontextPipeline": "flux-kontext",
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2ImgPipeline": "sd15",
    "StableDiffusionInpaintPipeline": "sd15-inpaint",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl-inpaint",
}
"""The pipeline's class that `model_index.json` names -> the base."""


def open_editor(
    model: str,
    placement: Placement | None = None,
    geometry: Geometry | None = None,
    depth_model: str | None = None,
    limits: SizeLimits = NO_LIMITS,
) -> BaseEditor:
    """The editor for a base model. No weights are loaded, and of a hub id nothing but its `model_index.json` is downloaded.

    Args:
        model: a folder, as it is or below `$MODEL_DIR`, or a hub id.
        placement: where its parts live, and in which numbers; by default in bfloat16 on a GPU if there is one, else in float32
            on the CPU.
        geometry: sizes of images; by default what suits the base and the adapter.
        depth_model: for the depth maps of Qwen-Image-Edit; the others have none.
        limits: sizes that take the place of the geometry's.

    Raises:
        InputError: there is no such model, it is of another kind, or it cannot be placed like that.
    """
    model, placement = find_model(model), placement or make_placement()
    base = base_of(model)
    if base == QWEN:
        from eval.qwen.editor import Editor

        named = ModelDirectory.resolve(model) if Path(model).is_dir() else model
        return Editor(named, placement, geometry, depth_model, limits)
    if base == "flux-kontext":
        from eval.bases.kontext import KontextEditor

        return KontextEditor(model, placement, geometry, limits)
    from eval.bases.stable_diffusion import StableDiffusionEditor

    return StableDiffusionEditor(model, base, placement, geometry, limits)


def open_model(options: ModelOptions, placement: Placement) -> BaseEditor:
    """The editor for the base model that a command line names.

    Raises:
        InputError: it names none, or as `open_editor`.
    """
    if options.model is None:
        raise InputError("--model is missing: name the base model's folder or hub id")
    return open_editor(options.model, placement, None, options.depth_model, options.limits)


def base_of(model: str) -> str:
    """The base's name, from `model_index.json` alone; a folder without one must have Qwen-Image-Edit's layout.

    Args:
        model: a folder or a hub id.

    Raises:
        InputError: there is no such model, or it is of another kind.
    """
    path = Path(model).expanduser()
    file = fetch(model, [INDEX]) / INDEX
    if not file.is_file():
        ModelDirectory.resolve(path)
        return QWEN
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error})") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in CLASSES:
        raise InputError(f"{model} is a {name}, which cannot be used here; those that can are {', '.join(CLASSES)}")
    return CLASSES[name]
