"""What an edit is asked for and what comes back: the same record for every base model, command and page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import MULTIPLE, Geometry, Size
from data_prep.rows.rows import EMPTY_PROMPT, MAX_SOURCES

ModeName = Literal["edit", "img2img", "variation", "inpaint", "focus", "control", "control-inpaint", "invert", "turbo"]
MODES: tuple[ModeName, ...] = get_args(ModeName)
SamplerName = Literal["flow", "lightning", "bridge", "bridge-white", "bridge-stochastic"]
ControlName = Literal["canny", "lines", "depth"]
ASPECTS = {"1:1": 1.0, "16:9": 16 / 9, "9:16": 9 / 16, "2.4:1": 2.4, "3:4": 3 / 4, "4:3": 4 / 3}
"""Width over height."""
AspectName = Literal["1:1", "16:9", "9:16", "2.4:1", "3:4", "4:3"]

MASKED = ("inpaint", "control-inpaint")
CONTROLLED = ("control", "control-inpaint")
WITH_STRENGTH = ("img2img", "variation", "inpaint", "focus", "control-inpaint", "invert")
DEFAULT_STRENGTHS = {"img2img": 0.6, "variation": 0.6, "invert": 0.8}
"""Of the modes that begin at the source; the others walk the whole way."""
BRIDGES = ("bridge", "bridge-white", "bridge-stochastic")
MAX_COUNT = 64
MAX_CFG_SCALE = 100
MAX_PIXELS = 4096 * 4096
"""Of a result: no base was trained beyond a quarter of it."""
FEATHER, MAX_FEATHER = 8.0, 1024

OnProgress = Callable[[int, int], None]
"""Called after every step of a sampler with the steps done and the steps in all, over all pictures of the call. What it raises
ends the edit: that is how one is cancelled."""


@dataclass(frozen=True)
class AdapterUse:
    """An adapter, and how much of it."""

    path: Path
    """A checkpoint folder or a safetensors file."""
    weight: float = 1.0
    """Multiplies its contribution; 0 is as if it were not there."""

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise InputError(f"the weight of {self.path} must be a number, got {self.weight}")


@dataclass(frozen=True)
class Focus:
    """A disc that an edit is limited to, with a soft rim. In shares of the picture: x of its width, y of its height, radius of
    its shorter side."""

    x: float = 0.5
    y: float = 0.5
    radius: float = 0.25

    def __post_init__(self):
        for name in ("x", "y", "radius"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"focus {name} must be in [0, 1], got {getattr(self, name)}")
        if self.radius == 0:
            raise InputError("focus radius must be more than 0")


@dataclass(frozen=True)
class Control:
    """A map made of the first image and given as a further reference."""

    kind: ControlName
    """Edges by Canny, lines as a drawing would have them, or depth."""
    strength: float = 1.0
    """0: as if it were not there, 1: as the model takes it; between and beyond by extrapolation, in [0, 2]. Where all of several
    are 1, the model sees them together; else each by itself, and their effects are added."""

    def __post_init__(self):
        if self.kind not in get_args(ControlName):
            raise InputError(f"a control is one of {', '.join(get_args(ControlName))}, got {self.kind!r}")
        if not 0 <= self.strength <= 2:
            raise InputError(f"the strength of {self.kind} must be in [0, 2], got {self.strength}")


@dataclass(frozen=True)
class EditRequest:
    """What is wanted.

    Raises:
        InputError: a value is out of its range, or is not one that the mode takes.
    """

    prompt: str
    """The instruction; `variation` takes none."""
    images: Sequence[Image.Image]
    """One to three RGB images; the first is the one that is edited, and the result has its shape."""
    mode: ModeName = "edit"
    adapters: Sequence[AdapterUse] = ()
    """Added up. The first says how it must be sampled, and at which sizes it was trained."""
    negative_prompt: str = EMPTY_PROMPT
    """Read only with classifier-free guidance."""
    mask: Image.Image | None = None
    """Mode L, of the first image's shape: 255 where the edit may go, 0 where every pixel is kept. (A dataset's `back_mask` is
    the other way round.) For `inpaint` and `control-inpaint`."""
    feather: float | None = None
    """Width of the mask's soft rim, pixels of the result; by default FEATHER."""
    focus: Focus | None = None
    """For `focus`; the middle by default."""
    controls: Sequence[Control] = ()
    """For `control` and `control-inpaint`; with the images they are at most three."""
    steps: int | None = None
    """Calls of the sampler; by default what suits it."""
    cfg_scale: float | None = None
    """Classifier-free guidance where the sampler has it: 1 is without; by default what suits the base."""
    strength: float | None = None
    """How far from the source, in (0, 1]: the share of the way that `img2img`, `variation` (and `inpaint`, if given) walk again,
    and the share of inverted steps that `invert` walks back with the instruction."""
    sampler: SamplerName | None = None
    """By default as the first adapter was trained."""
    seed: int = 0
    count: int = 1
    """Pictures; picture i has the seed `seed + i`, and is the one that this seed gives alone."""
    size: Size | None = None
    """Of the result, in multiples of 32; by default as the first image, within the geometry's `max_pixels`."""
    aspect: AspectName | None = None
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
        self._check_numbers()
        self._check_mode()

    def _check_numbers(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be positive, got {self.steps}")
        if self.cfg_scale is not None and not 1 <= self.cfg_scale <= MAX_CFG_SCALE:
            raise InputError(f"cfg_scale must be in [1, {MAX_CFG_SCALE}] (1 is without guidance), got {self.cfg_scale}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"strength must be in (0, 1], got {self.strength}")
        if not 1 <= self.count <= MAX_COUNT:
            raise InputError(f"count must be 1 to {MAX_COUNT}, got {self.count}")
        if not 0 <= self.seed < 2**63 - MAX_COUNT:
            raise InputError(f"seed must be 0 or more, and below 2^63, got {self.seed}")
        if self.feather is not None and not 0 <= self.feather <= MAX_FEATHER:
            raise InputError(f"feather must be in [0, {MAX_FEATHER}], got {self.feather}")
        if self.size and (min(self.size) < MULTIPLE or any(side % MULTIPLE for side in self.size)):
            raise InputError(f"size must be in multiples of {MULTIPLE}, got {self.size.width}x{self.size.height}")
        if self.size and self.size.height * self.size.width > MAX_PIXELS:
            raise InputError(f"size {self.size.width}x{self.size.height} is more than {MAX_PIXELS:,} pixels")
        if self.aspect is not None and self.aspect not in ASPECTS:
            raise InputError(f"aspect must be one of {', '.join(ASPECTS)}, got {self.aspect!r}")
        if self.size and self.aspect:
            raise InputError(f"size and aspect both say how large the result is: leave out aspect={self.aspect}")

    def _check_mode(self) -> None:
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:
                raise InputError(f"{name} is not UTF-8 text") from None
        if self.mode == "variation" and self.prompt.strip():
            raise InputError("variation takes no instruction: leave the prompt empty, or use mode=img2img")
        if self.mode != "variation" and not self.prompt.strip():
            raise InputError(f"mode={self.mode} needs an instruction; mode=variation does without")
        needs = {"mask": (self.mask is not None, MASKED), "controls": (bool(self.controls), CONTROLLED)}
        for name, (given, modes) in needs.items():
            if given and self.mode not in modes:
                raise InputError(f"{name} is given, but mode={self.mode} takes none: use mode={' or '.join(modes)}")
            if not given and self.mode in modes:
                raise InputError(f"mode={self.mode} needs {'a mask' if name == 'mask' else 'at least one control'}")
        if self.feather is not None and self.mode not in MASKED:
            raise InputError(f"feather is given, but mode={self.mode} has no mask: use mode={' or '.join(MASKED)}")
        if self.focus and self.mode != "focus":
            raise InputError(f"focus is given, but mode={self.mode} takes none: use mode=focus")
        if self.strength is not None and self.mode not in WITH_STRENGTH:
            raise InputError(f"strength is given, but mode={self.mode} takes none: use mode={', '.join(WITH_STRENGTH)}")

    @property
    def rim(self) -> float:
        """Width of the mask's soft rim, pixels."""
        return FEATHER if self.feather is None else self.feather

    @property
    def seeds(self) -> range:
        """One for each picture."""
        return range(self.seed, self.seed + self.count)


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
