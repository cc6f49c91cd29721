"""What an edit is asked for and what comes back: the same record for every base model, command and page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import MULTIPLE, Geometry, Size
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
    declared,
    parse_size,
)

ASPECTS = {name: float(name.partition(":")[0]) / float(name.partition(":")[2]) for name in get_args(AspectName)}
"""Width over height."""
MASKED: tuple[ModeName, ...] = ("inpaint", "control-inpaint")
CONTROLLED: tuple[ModeName, ...] = ("control", "control-inpaint")
WITH_STRENGTH: tuple[ModeName, ...] = ("img2img", "variation", "inpaint", "focus", "control-inpaint", "invert")
DEFAULT_STRENGTHS = {"img2img": 0.6, "variation": 0.6, "invert": 0.8}
"""Of the modes that begin at the source; the others walk the whole way."""
BRIDGES = ("bridge", "bridge-white", "bridge-stochastic")
MAX_STEPS, MAX_COUNT, MAX_CFG_SCALE, MAX_PROMPT = 1000, 64, 100, 10_000
MAX_PIXELS = 4096 * 4096
"""Of a result: no base was trained beyond a quarter of it."""
FEATHER, MAX_FEATHER = 8.0, 1024

OnProgress = Callable[[int, int], None]
"""Called after every step of a sampler with the steps done and the steps in all, over all pictures of the call. What it raises
ends the edit: that is how one is cancelled."""


@dataclass(frozen=True)
class EditRequest:
    """What is wanted. A field with a `Knob` is an option of the command line, a column of tables and a setting of pictures too.

    Raises:
        InputError: a value is out of its range, or is not one that the mode takes.
    """

    prompt: Annotated[str, Knob("The instruction.", most=MAX_PROMPT, label="Instruction")]
    """The instruction; `variation` takes none."""
    images: Sequence[Image.Image]
    """One to three RGB images; the first is the one that is edited, and the result has its shape."""
    mode: Annotated[ModeName, Knob("What is done; docs/editing.md explains each.", "edit")] = "edit"
    adapters: Annotated[
        Sequence[AdapterUse],
        Knob(
            "Run, checkpoint or safetensors file, as named or below $CHECKPOINT_DIR; repeatable, added up.",
            *("the base model",),
            parse=AdapterUse.parse,
            metavar="PATH[:WEIGHT]",
            option="adapter",
            label="Adapter",
        ),
    ] = ()
    """Added up. The first says how it must be sampled, and at which sizes it was trained."""
    negative_prompt: Annotated[str, Knob("What guidance leads away from.", "nothing", most=MAX_PROMPT)] = EMPTY_PROMPT
    """Read only with classifier-free guidance."""
    mask: Image.Image | None = None
    """Mode L, of the first image's shape: 255 where the edit may go, 0 where every pixel is kept. (A dataset's `back_mask` is
    the other way round.) For `inpaint` and `control-inpaint`."""
    feather: Annotated[
        float | None,
        Knob(
            *("Width of the mask's feathered edge, in pixels of the result.", f"{FEATHER:g}", 0, MAX_FEATHER),
            modes=MASKED,
        ),
    ] = None
    """Width of the mask's soft rim, pixels of the result; by default FEATHER."""
    focus: Annotated[
        Focus | None,
        Knob(
            "For mode focus: where the edit may go, in shares of the picture.",
            "0.5,0.5,0.25",
            modes=("focus",),
            parse=Focus.parse,
            metavar="X,Y,R",
        ),
    ] = None
    """For `focus`; the middle by default."""
    controls: Annotated[
        Sequence[Control],
        Knob(
            "For mode control: a map of the image (canny, lines, depth) as a reference; repeatable.",
            modes=CONTROLLED,
            needed=True,
            parse=Control.parse,
            metavar="KIND[:STRENGTH]",
            option="control",
            label="Maps of the source",
        ),
    ] = ()
    """For `control` and `control-inpaint`; with the images they are at most three."""
    steps: Annotated[int | None, Knob("Of the sampler.", "4 for a bridge, 40 for flow matching", 1, MAX_STEPS)] = None
    """Calls of the sampler; by default what suits it."""
    cfg_scale: Annotated[
        float | None,
        Knob("Guidance of flow matching, 1 for none.", "4 for flow matching", 1, MAX_CFG_SCALE, label="Guidance scale"),
    ] = None
    """Classifier-free guidance where the sampler has it: 1 is without; by default what suits the base."""
    strength: Annotated[
        float | None,
        Knob(
            *("How far from the source, over 0 to 1, in modes that have it.", "by the mode", 0, 1, True),
            modes=WITH_STRENGTH,
            label="Denoising strength",
        ),
    ] = None
    """How far from the source, in (0, 1]: the share of the way that `img2img`, `variation` (and `inpaint`, if given) walk again,
    and the share of inverted steps that `invert` walks back with the instruction."""
    sampler: Annotated[SamplerName | None, Knob(default="as the adapter was trained")] = None
    """By default as the first adapter was trained."""
    seed: Annotated[int, Knob("Of the noise.", "0", 0, 2**63 - 1 - MAX_COUNT)] = 0
    count: Annotated[int, Knob("Pictures, with the seeds seed, seed + 1, …", "1", 1, MAX_COUNT, label="Pictures")] = 1
    """Pictures; picture i has the seed `seed + i`, and is the one that this seed gives alone."""
    size: Annotated[Size | None, Knob("In multiples of 32.", "as the first image", parse=parse_size, metavar="WxH")] = (
        None
    )
    """Of the result, in multiples of 32; by default as the first image, within the geometry's `max_pixels`."""
    aspect: Annotated[AspectName | None, Knob("Shape of the result.", "as the first image")] = None
    """The result's shape instead of its size: as many pixels as the source would have."""
    bridge_image: int = 0
    """Which of the images an edit begins at, as in a dataset file."""
    geometry: Geometry | None = None
    """Sizes of images; by default what suits the base and the first adapter."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 1 <= len(self.images) + len(self.controls) <= MAX_SOURCES or not self.images:
            with_maps = f" and {len(self.controls)} control maps" if self.controls else ""
            raise InputError(f"an edit takes 1 to {MAX_SOURCES} images, got {len(self.images)}{with_maps}")
        if not 0 <= self.bridge_image < len(self.images):
            raise InputError(f"bridge_image={self.bridge_image} of {len(self.images)} image(s), counted from 0")
        for each in KNOBS:
            each.knob.check(each.field, getattr(self, each.field))
        self._check_size()
        self._check_mode()

    def _check_size(self) -> None:
        if self.size and (min(self.size) < MULTIPLE or any(side % MULTIPLE for side in self.size)):
            raise InputError(f"size must be in multiples of {MULTIPLE}, got {self.size.width}x{self.size.height}")
        if self.size and self.size.height * self.size.width > MAX_PIXELS:
            raise InputError(f"size {self.size.width}x{self.size.height} is more than {MAX_PIXELS:,} pixels")
        if self.aspect is not None and self.aspect not in ASPECTS:
            raise InputError(f"aspect must be one of {', '.join(ASPECTS)}, got {self.aspect!r}")
        if self.size and self.aspect:
            raise InputError(f"size and aspect both say how large the result is: leave out aspect={self.aspect}")

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
        """Width of the mask's soft rim, pixels."""
        return FEATHER if self.feather is None else self.feather

    @property
    def seeds(self) -> range:
        """One for each picture."""
        return range(self.seed, self.seed + self.count)


KNOBS = tuple(declared(EditRequest))
"""In the order of the fields."""


@dataclass(frozen=True)
class EditResult:
    """What was made of it."""

    image: Image.Image
    seed: int
    seconds: float
    """Of this picture: encoding, sampling, decoding, with models loaded."""
    settings: dict[str, Any]
    """Everything but the images that is needed to make it again, and what made it; values that JSON knows."""
    maps: Sequence[Image.Image] = field(default=())
    """The control maps that the model was shown."""
    encoding: float = 0.0
    """The seconds of it before the first step; 0 where nobody knows."""


@dataclass(frozen=True)
class Abilities:
    """What a base model can be asked."""

    base: str
    """Its name: `qwen-image-edit`, `flux-kontext`, `sd15`, `sdxl`."""
    modes: tuple[ModeName, ...]
    max_images: int
    samplers: tuple[SamplerName, ...] = ()
    """Those that a request may name; empty: it must leave the choice to the base."""

    def has(self, knob: Declared) -> bool:
        """Whether any of the base's modes takes this."""
        return any(mode in knob.knob.modes for mode in self.modes) and (knob.field != "sampler" or bool(self.samplers))

    def check(self, request: EditRequest) -> None:
        """Nothing is loaded for it.

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
