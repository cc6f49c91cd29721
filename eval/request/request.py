"""The request for an edit and its result: the same records for every base model, command and page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import MULTIPLE, Geometry, Size, UpstreamGeometry
from data_prep.rows.rows import EMPTY_PROMPT, MAX_SOURCES
from eval.request.knobs import (
    MODES,
    AdapterUse,
    AspectName,
    Control,
    Declared,
    Focus,
    Knob,
    ModeName,
    SamplerName,
    SizingName,
    declared,
    parse_size,
)

ASPECTS = {name: float(name.partition(":")[0]) / float(name.partition(":")[2]) for name in get_args(AspectName)}
"""Width over height."""
MASKED: tuple[ModeName, ...] = ("inpaint", "control-inpaint")
KEEPING: tuple[ModeName, ...] = (*MASKED, "focus")
"""Modes that change a part of the picture alone, and keep every pixel of the rest."""
CONTROLLED: tuple[ModeName, ...] = ("control", "control-inpaint")
WITH_STRENGTH: tuple[ModeName, ...] = ("img2img", "variation", "inpaint", "focus", "control-inpaint", "invert")
DEFAULT_STRENGTHS = {"img2img": 0.6, "variation": 0.6, "invert": 0.8}
"""Default strengths of the modes that begin at the source. The others always take the whole path."""
BRIDGES = ("bridge", "bridge-white", "bridge-stochastic")
MAX_STEPS, MAX_COUNT, MAX_CFG_SCALE, MAX_PROMPT = 1000, 64, 100, 10_000
UPSTREAM_MULTIPLE = 16
"""Of a result's sides in diffusers' pipelines: a latent cell has 8 pixels, a token two cells."""
MAX_PIXELS = 4096 * 4096
"""Largest area of a result: no base was trained beyond a quarter of it."""
FEATHER, MAX_FEATHER = 8.0, 1024

OnProgress = Callable[[int, int], None]
"""Called after every step of a sampler with the steps done and the total steps, over all images of the call. An exception in it
ends the edit, which is how an edit is cancelled."""


@dataclass(frozen=True)
class EditRequest:
    """An edit to make. A field with a `Knob` is also an option of the command line, a column of tables and a setting in results.

    Raises:
        InputError: a value is out of its range, or the mode does not take it.
    """

    prompt: Annotated[str, Knob("Instruction for the edit.", most=MAX_PROMPT, label="Instruction")]
    """The instruction; `variation` takes none."""
    images: Sequence[Image.Image]
    """One to three RGB images. The first one is edited, and the result has its shape. The others are references."""
    mode: Annotated[ModeName, Knob("Way of editing, explained in docs/editing.md.", "edit")] = "edit"
    adapters: Annotated[
        Sequence[AdapterUse],
        Knob(
            "LoRA to apply: run folder, checkpoint or safetensors file, also below $CHECKPOINT_DIR. Repeatable.",
            *("the base model",),
            parse=AdapterUse.parse,
            metavar="PATH[:WEIGHT]",
            option="adapter",
            label="Adapter",
        ),
    ] = ()
    """Adapters to add up. The first one decides the sampler and the sizes."""
    negative_prompt: Annotated[
        str, Knob("Negative prompt, used with a guidance scale above 1.", "none", most=MAX_PROMPT)
    ] = EMPTY_PROMPT
    """Negative prompt, used only with classifier-free guidance."""
    mask: Image.Image | None = None
    """Mask for `inpaint` and `control-inpaint`: mode L, of the first image's shape, 255 where the image is edited, and 0
    where every pixel is kept. (A dataset's `back_mask` is the opposite.)"""
    feather: Annotated[
        float | None,
        Knob(
            *("Feathering: width of the mask's soft edge, in pixels of the result.", f"{FEATHER:g}", 0, MAX_FEATHER),
            modes=MASKED,
        ),
    ] = None
    """Width of the mask's soft edge, in pixels of the result; by default FEATHER."""
    focus: Annotated[
        Focus | None,
        Knob(
            "Disc to edit in mode focus: centre and radius as shares of the image, 0–1.",
            "0.5,0.5,0.25",
            modes=("focus",),
            parse=Focus.parse,
            metavar="X,Y,R",
        ),
    ] = None
    """Disc to edit in mode `focus`; by default in the middle."""
    controls: Annotated[
        Sequence[Control],
        Knob(
            "Control map made from the image: canny, lines or depth, with a strength of 0–2. Repeatable.",
            modes=CONTROLLED,
            needed=True,
            parse=Control.parse,
            metavar="KIND[:STRENGTH]",
            option="control",
            label="Maps of the source",
        ),
    ] = ()
    """Control maps for `control` and `control-inpaint`. Together with the images, there are at most three."""
    steps: Annotated[
        int | None, Knob("Number of sampling steps.", "4 for a bridge, 40 for flow matching", 1, MAX_STEPS)
    ] = None
    """Number of sampling steps; by default the sampler's own."""
    cfg_scale: Annotated[
        float | None,
        Knob(
            "Guidance scale for flow matching. 1 turns guidance off.",
            "4 for flow matching",
            1,
            MAX_CFG_SCALE,
            label="Guidance scale",
        ),
    ] = None
    """Guidance scale, if the sampler has guidance. 1 turns it off; by default it is the base model's own."""
    strength: Annotated[
        float | None,
        Knob(
            *(
                "Denoising strength, 0–1: how far the result may move from the source.",
                "0.6; 0.8 for invert; 1 for inpaint and focus",
                0,
                1,
                True,
            ),
            modes=WITH_STRENGTH,
            label="Denoising strength",
        ),
    ] = None
    """How far from the source, in (0, 1]: the share of the way that `img2img`, `variation` (and `inpaint`, if given) walk again,
    and the share of inverted steps that `invert` walks back with the instruction."""
    sampler: Annotated[
        SamplerName | None, Knob("Sampler to use instead of the adapter's own.", "as the adapter was trained")
    ] = None
    """Sampler; by default the one that the first adapter was trained for."""
    seed: Annotated[int, Knob("Random seed for the noise.", "0", 0, 2**63 - 1 - MAX_COUNT)] = 0
    count: Annotated[
        int, Knob("Number of images, made with the seeds seed, seed + 1 and so on.", "1", 1, MAX_COUNT, label="Images")
    ] = 1
    """Number of images. Image i has the seed `seed + i`, and is the same as with this seed alone."""
    size: Annotated[
        Size | None,
        Knob(
            "Size of the result in pixels, in multiples of 32 (of 16 with --geometry upstream).",
            "as the first image",
            parse=parse_size,
            metavar="WxH",
        ),
    ] = None
    """Size of the result, in multiples of 32; by default that of the first image, within the geometry's `max_pixels`."""
    aspect: Annotated[AspectName | None, Knob("Aspect ratio of the result.", "as the first image")] = None
    """Aspect ratio of the result, with as many pixels as the source would have. It replaces `size`."""
    sizing: Annotated[
        SizingName | None,
        Knob(
            "How images are sized: as this project trains (own), or as diffusers' pipeline of the model (upstream).",
            "own for an adapter trained here, upstream otherwise",
            option="geometry",
            label="Sizes of images",
        ),
    ] = None
    """Rules for the sizes of images, for Qwen-Image-Edit. `geometry` replaces them."""
    bridge_image: int = 0
    """Number of the image that a bridge starts from, as in a dataset file."""
    original: Image.Image | None = None
    """The first image with its transparency (RGBA), which the modes with a mask keep; None for an opaque image."""
    geometry: Geometry | None = None
    """Sizes of images; by default those of the base model, the first adapter and `sizing`."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 1 <= len(self.images) + len(self.controls) <= MAX_SOURCES or not self.images:
            with_maps = f" and {len(self.controls)} control maps" if self.controls else ""
            raise InputError(f"an edit takes 1 to {MAX_SOURCES} images, got {len(self.images)}{with_maps}")
        if not 0 <= self.bridge_image < len(self.images):
            raise InputError(
                f"bridge_image={self.bridge_image} is not one of the {len(self.images)} image(s), counted from 0"
            )
        for each in KNOBS:
            each.knob.check(each.field, getattr(self, each.field))
        self._check_size()
        self._check_mode()

    def _check_size(self) -> None:
        if self.sizing is not None and self.sizing not in get_args(SizingName):
            raise InputError(f"geometry must be one of {', '.join(get_args(SizingName))}, got {self.sizing!r}")
        upstream = self.sizing == "upstream" or isinstance(self.geometry, UpstreamGeometry)
        multiple = UPSTREAM_MULTIPLE if upstream else MULTIPLE
        if self.size and (min(self.size) < multiple or any(side % multiple for side in self.size)):
            raise InputError(f"size must be in multiples of {multiple}, got {self.size.width}x{self.size.height}")
        if self.size and self.size.height * self.size.width > MAX_PIXELS:
            raise InputError(f"size {self.size.width}x{self.size.height} is more than {MAX_PIXELS:,} pixels")
        if self.aspect is not None and self.aspect not in ASPECTS:
            raise InputError(f"aspect must be one of {', '.join(ASPECTS)}, got {self.aspect!r}")
        if self.size and self.aspect:
            raise InputError(f"size and aspect both set the size of the result: leave out aspect={self.aspect}")

    def _check_mode(self) -> None:
        if self.mode == "variation" and self.prompt.strip():
            raise InputError("variation takes no instruction: leave the prompt empty, or use mode=img2img")
        if self.mode != "variation" and not self.prompt.strip():
            raise InputError(f"mode={self.mode} needs an instruction; mode=variation does without")
        for name, modes, needed in (("mask", MASKED, True), *((k.field, k.knob.modes, k.knob.needed) for k in KNOBS)):
            given = getattr(self, name) not in (None, (), [])
            if given and self.mode not in modes:
                raise InputError(f"{name} is given, but mode={self.mode} takes none: use mode={' or '.join(modes)}")
            if needed and not given and self.mode in modes:
                raise InputError(f"mode={self.mode} needs {'a mask' if name == 'mask' else 'at least one control'}")

    @property
    def rim(self) -> float:
        """Width of the mask's soft edge, in pixels."""
        return FEATHER if self.feather is None else self.feather

    @property
    def seeds(self) -> range:
        """One seed for each image."""
        return range(self.seed, self.seed + self.count)


KNOBS = tuple(declared(EditRequest))
"""In the order of the fields."""


@dataclass(frozen=True)
class EditResult:
    """The result of an edit."""

    image: Image.Image
    seed: int
    seconds: float
    """Seconds for this image: encoding, sampling, decoding, with models loaded."""
    settings: dict[str, Any]
    """Everything except the images that is needed to make it again, and what made it, as JSON values."""
    maps: Sequence[Image.Image] = field(default=())
    """The control maps that the model saw."""
    encoding: float = 0.0
    """The part of the seconds before the first step; 0 if not known."""


@dataclass(frozen=True)
class Abilities:
    """What a base model can do."""

    base: str
    """Its name: `qwen-image-edit`, `flux-kontext`, `sd15`, `sdxl`."""
    modes: tuple[ModeName, ...]
    max_images: int
    samplers: tuple[SamplerName, ...] = ()
    """The samplers that a request may name. Empty: it must leave the choice to the base model."""

    def has(self, knob: Declared) -> bool:
        """Whether any of the base's modes takes this."""
        of_samplers = knob.field in ("sampler", "sizing")
        return any(mode in knob.knob.modes for mode in self.modes) and (bool(self.samplers) or not of_samplers)

    def check(self, request: EditRequest) -> None:
        """Checks a request without loading anything.

        Raises:
            InputError: the base cannot serve the request.
        """
        if request.mode not in self.modes:
            raise InputError(f"{self.base} has no mode={request.mode}; it has {', '.join(self.modes)}")
        if len(request.images) > self.max_images:
            raise InputError(f"{self.base} takes at most {self.max_images} image(s), got {len(request.images)}")
        if request.sampler and request.sampler not in self.samplers:
            known = f"it has {', '.join(self.samplers)}" if self.samplers else "leave sampler out"
            raise InputError(f"{self.base} has no sampler={request.sampler}; {known}")
