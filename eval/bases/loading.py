"""Pipelines of diffusers from a folder or the hub, in their place. Weights are read from safetensors alone."""

import logging
from pathlib import Path
from typing import Any, TypeVar

from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from data_prep.errors import InputError
from eval.request.placement import Placement

SDPipeline = StableDiffusionImg2ImgPipeline | StableDiffusionInpaintPipeline
SDXLPipeline = StableDiffusionXLImg2ImgPipeline | StableDiffusionXLInpaintPipeline
HALF = "fp16"
"""How diffusers marks weights in half precision: `model.fp16.safetensors`."""
P = TypeVar("P", bound=DiffusionPipeline)


def load_kontext(folder: Path, placement: Placement) -> FluxKontextPipeline:
    """FLUX.1 Kontext.

    Raises:
        InputError: the folder does not hold one that is whole.
    """
    return _load(FluxKontextPipeline, folder, placement)


def load_sd15(folder: Path, placement: Placement, masked: bool = False) -> SDPipeline:
    """Stable Diffusion 1.x or 2.x, with its safety checker if the folder has one.

    Args:
        masked: the pipeline that takes a mask, instead of the one that begins at the whole picture.

    Raises:
        InputError: the folder does not hold one that is whole.
    """
    return _load(StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline, folder, placement)


def load_sdxl(folder: Path, placement: Placement, masked: bool = False) -> SDXLPipeline:
    """Stable Diffusion XL; arguments and errors as `load_sd15`."""
    return _load(StableDiffusionXLInpaintPipeline if masked else StableDiffusionXLImg2ImgPipeline, folder, placement)


def pipeline_folder(model: str) -> Path:
    """A folder as it is, or a hub id's, downloaded (or found in the hub's cache) with progress.

    Raises:
        InputError: the hub does not have it or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(f"no folder {model}, and downloading it from the hub failed: {first_line(error)}") from error


def check_placement(placement: Placement, base: str) -> None:
    """What Qwen-Image-Edit can do and these pipelines cannot.

    Raises:
        InputError: the placement asks for it.
    """
    asked = {
        f"weights={placement.weights}": placement.weights != "full",
        "a GGUF file": placement.gguf is not None,
        "compile": placement.compile,
        "encoder_device": placement.encoder_device not in (None, placement.device),
    }
    if refused := [name for name, is_asked in asked.items() if is_asked]:
        raise InputError(
            f"{base} does not support {refused[0]}: leave it out; offload=model or offload=layer saves memory too"
        )
    if placement.offload != "none" and placement.device.type == "cpu":
        raise InputError(f"offload={placement.offload} of {base} needs a GPU, and device is cpu: leave it out")


def place(pipeline: P, placement: Placement) -> P:
    """Puts a pipeline where the placement says."""
    if placement.vae_tiling:
        pipeline.vae.enable_tiling()
    if placement.offload == "model":
        pipeline.enable_model_cpu_offload(device=placement.device)
    elif placement.offload == "layer":
        pipeline.enable_sequential_cpu_offload(device=placement.device)
    else:
        pipeline.to(placement.device)
    return pipeline


def changed_to(cls: type[P], pipeline: DiffusionPipeline, placement: Placement) -> P:
    """The same parts, adapters included, in a pipeline of another class. The old one is not to be used any more."""
    pipeline.remove_all_hooks()
    changed: Any = cls.from_pipe(pipeline, dtype=placement.dtype)  # without dtype it would turn all to float32
    changed.set_progress_bar_config(disable=True)
    return place(changed, placement)


def first_line(error: Exception) -> str:
    """What an error says, short enough for a sentence: its first line, and the second if that only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


def _load(cls: type[P], folder: Path, placement: Placement) -> P:
    diffusers_logging.disable_progress_bar()
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_is_worth_saying)
    transformers_logging.disable_progress_bar()
    files = {"use_safetensors": True, "local_files_only": True, "variant": _variant(folder)}
    try:
        pipeline = cls.from_pretrained(folder, dtype=placement.dtype, **files)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return place(pipeline, placement)


def _variant(folder: Path) -> str | None:
    """`fp16` where the weights are there under that name alone: the half of SDXL's download that many take."""
    names = [file.name for file in folder.glob("*/*.safetensors")]
    return HALF if names and all(f".{HALF}" in name for name in names) else None


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Not that an empty list of modules should be kept in float32, which SDXL's own pipeline brings about with every picture."""
    return "should be kept in float32: []" not in record.getMessage()
