"""What each mode means for an adapter: a sampler, its steps, and the parts of the picture it may change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size, fit, fit_mask, fitted_part
from eval.qwen.inversion import InversionSampler
from eval.qwen.masks import Kept, check_mask, focus_mask, soft_mask
from eval.qwen.samplers import BridgeSampler, FlowSampler, Sampler
from eval.qwen.samplers.sigmas import linear_sigmas, walked_steps
from eval.qwen.samplers.solvers import SolverName
from eval.request.knobs import Focus, SamplerName
from eval.request.metadata import trained_bridge, trained_sigmas
from eval.request.request import ASPECTS, BRIDGES, DEFAULT_STRENGTHS, KEEPING, MASKED, EditRequest

FLOW_CFG_SCALE, FLOW_STEPS = 4.0, 40
"""As Qwen-Image-Edit is meant to be sampled."""
BRIDGE_STEPS = 4
LIGHTNING_STEPS = 4
INVERSION_STEPS = 20
FLOW_SOLVERS: dict[SamplerName, SolverName] = {
    "flow": "euler",
    "heun": "heun",
    "dpmpp-2m": "dpmpp-2m",
    "unipc": "unipc",
}
"""Samplers of flow matching with guidance -> how they make their steps."""
COMPARED: dict[SamplerName, tuple[int, ...]] = {
    **dict.fromkeys(FLOW_SOLVERS, (4, 20)),
    "lightning": (LIGHTNING_STEPS,),
}
"""Step counts of an evaluation; those of a bridge are BRIDGES_COMPARED."""
BRIDGES_COMPARED = (1, 2, 4)
MAX_SUGGESTED_STEPS = 16
FROM_NOISE = ("img2img", "variation", "invert")
"""Modes that need the way from noise."""


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler and the steps that suit it."""

    sampler: Sampler
    steps: int
    """For one good image."""


def choose_sampler(metadata: Mapping[str, str], cfg_scale: float | None = None) -> SamplerChoice:
    """The sampler for what the adapter was trained with; without an adapter (no metadata), flow matching.

    Args:
        metadata: metadata of the adapter's file: `objective` ("lbm" or "flow") and `loss`, the loss's arguments as JSON.
        cfg_scale: guidance scale of classifier-free guidance, for flow matching alone; 4 by default.

    Raises:
        InputError: guidance is asked of a bridge, or the objective is unknown.
    """
    objective = metadata.get("objective", "flow")
    if objective == "flow":
        return SamplerChoice(FlowSampler(FLOW_CFG_SCALE if cfg_scale is None else cfg_scale), FLOW_STEPS)
    if objective != "lbm":
        raise InputError(f"the adapter's objective is {objective!r}; this version samples 'lbm' and 'flow'")
    if cfg_scale not in (None, 1.0):
        raise InputError(f"a bridge (objective lbm) is sampled without guidance: leave out cfg_scale={cfg_scale}")
    loss = trained_bridge(metadata)
    sampler = BridgeSampler(
        start="white" if loss.get("sub_prob") == 1 else "source",
        bridge_noise=loss.get("bridge_noise", 0.0),
        prediction=loss.get("prediction", "displacement"),
    )
    return SamplerChoice(sampler, BRIDGE_STEPS)


@dataclass(frozen=True)
class Plan:
    """How a request is sampled."""

    name: SamplerName
    sampler: Sampler
    steps: int
    notes: tuple[str, ...] = ()
    """What the user should know of it."""

    @property
    def compared(self) -> tuple[int, ...]:
        """The step counts that an evaluation tries."""
        return COMPARED.get(self.name, BRIDGES_COMPARED)


def make_plan(request: EditRequest, metadata: Mapping[str, str]) -> Plan:
    """The sampler and its steps: what the request says, and else what suits its mode and its first adapter.

    Args:
        metadata: metadata of the first adapter's file; empty without one.

    Raises:
        InputError: the adapter cannot be sampled as asked.
    """
    if request.mode == "turbo" and not request.adapters:
        raise InputError(
            "mode=turbo needs an adapter that edits in a few steps: a step-distilled one (Lightning) or a bridge"
        )
    if request.sampler in FLOW_SOLVERS and trained_bridge(metadata).get("preserve"):
        metadata = {}  # the base model's own way was kept, and is asked for
    trained = choose_sampler(metadata, request.cfg_scale)
    if isinstance(trained.sampler, BridgeSampler):
        plan = _bridge(request, trained.sampler, trained_bridge(metadata))
        plan = replace(plan, notes=_untrained_steps(plan.steps, trained_sigmas(metadata)))
    else:
        plan = _flow(request)
    if request.count > 1 and not plan.sampler.draws:
        raise InputError(
            f"mode={request.mode} with sampler={plan.name} uses no random noise, so all {request.count} images would be the "
            "same: leave out count" + (", or use sampler=bridge-stochastic" if plan.name in BRIDGES else "")
        )
    return plan


def _flow(request: EditRequest) -> Plan:
    own = "lightning" if request.mode == "turbo" else "flow"
    name = request.sampler or own
    if name in BRIDGES:
        raise InputError(
            f"sampler={name} needs an adapter that is a bridge (objective lbm): leave it out, or use sampler={own}"
        )
    strength = request.strength or DEFAULT_STRENGTHS.get(request.mode, 1.0)
    if name == "lightning":
        if request.cfg_scale not in (None, 1.0):
            raise InputError(
                f"sampler=lightning was distilled to work without guidance: leave out cfg_scale={request.cfg_scale}"
            )
        sampler, steps = FlowSampler(1.0, shift="lightning"), LIGHTNING_STEPS
    else:
        sampler = FlowSampler(request.cfg_scale or FLOW_CFG_SCALE, solver=FLOW_SOLVERS[name])
        steps = FLOW_STEPS
    if request.mode == "invert":
        if sampler.solver != "euler":
            raise InputError(f"mode=invert has a method of its own for both ways: leave out sampler={name}")
        sampler, steps = InversionSampler(sampler, strength), INVERSION_STEPS
    else:
        sampler = replace(sampler, strength=strength)
    steps = request.steps or steps
    try:
        walked_steps(steps, strength)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Plan(name, sampler, steps)


def _bridge(request: EditRequest, trained: BridgeSampler, loss: Mapping[str, Any]) -> Plan:
    own = "bridge" if trained.start == "source" else "bridge-white"
    name = request.sampler or own
    if request.mode in FROM_NOISE:
        raise InputError(
            f"mode={request.mode} starts from noise, but the adapter is a bridge (objective lbm): use mode=edit"
        )
    if name not in BRIDGES:
        raise InputError(
            f"sampler={name} does not suit a bridge (objective lbm): leave it out, or use sampler={own}. Only a bridge trained "
            "with loss.preserve can use sampler=flow"
        )
    if request.strength not in (None, 1.0):
        raise InputError(f"a bridge has no denoising strength: leave out strength={request.strength}")
    if name == "bridge-white" and loss.get("sub_prob") == 0:
        raise InputError(
            "sampler=bridge-white needs a sub stream, but the adapter was trained without one (sub_prob=0)"
        )
    start = "white" if name == "bridge-white" else "source"
    sampler = replace(trained, start=start, stochastic=name == "bridge-stochastic")
    return Plan(name, sampler, request.steps or BRIDGE_STEPS)


def _untrained_steps(num_steps: int, sigmas: list[float] | None) -> tuple[str, ...]:
    """A note if so many steps visit other sigmas than those that were trained (None: any)."""
    if sigmas is None:
        return ()

    def others(count: int) -> list[float]:
        visited = linear_sigmas(count)[:-1]
        return [s for s in visited if not any(math.isclose(s, trained, abs_tol=1e-3) for trained in sigmas)]

    if not (untrained := others(num_steps)):
        return ()
    suited = [str(count) for count in range(1, MAX_SUGGESTED_STEPS + 1) if not others(count)]
    instead = f"; {' or '.join(suited)} steps would not" if suited else ""
    values, visited = (", ".join(f"{sigma:.3g}" for sigma in some) for some in (sigmas, untrained))
    return (f"the adapter was trained at sigma {values}, but {num_steps} steps also visit {visited}{instead}",)


def result_size(request: EditRequest, geometry: Geometry) -> Size:
    """Size that the model computes at: the request's, or as many pixels as the source has in the request's aspect, or as the
    source."""
    if request.size:
        return request.size
    source = Size.of(request.images[0])
    return geometry.shaped_size(source, ASPECTS[request.aspect]) if request.aspect else geometry.target_size(source)


def edit_mask(request: EditRequest, size: Size, stretched: bool = False) -> Image.Image | None:
    """The soft mask at the result's size, 255 where the edit may go, or None where it may go everywhere.

    Args:
        stretched: all of the first image is shown at that size, stretched where its shape is another, and nothing is cropped.
    """
    if request.mode == "focus":
        return focus_mask(size, request.focus or Focus())
    if request.mode not in MASKED:
        return None
    assert request.mask is not None
    return soft_mask(fit_mask(request.mask, size, stretched), request.rim)


def keeps_size(request: EditRequest) -> bool:
    """Whether the result is the first image at its own size with a part edited."""
    return request.mode in KEEPING and not (request.size or request.aspect or request.bridge_image)


def kept_part(request: EditRequest, size: Size, stretched: bool = False) -> Kept | None:
    """What the edited part is put into, None where the edit may go everywhere: the first image at its own size, or at the
    result's, if the request says how large or of which shape that is.

    Args:
        size: of what is sampled.
    """
    if (mask := edit_mask(request, size, stretched)) is None:
        return None
    if not keeps_size(request):
        return Kept(fit(request.images[request.bridge_image], size), mask)
    picture = request.original or request.images[0]
    own = Size.of(picture)
    shown = own if stretched else fitted_part(own, size)
    if request.mode == "focus":
        return Kept(picture, focus_mask(own, request.focus or Focus(), shown), stretched)
    assert request.mask is not None
    return Kept(picture, soft_mask(request.mask, request.rim * shown[1] / size.width), stretched)


def changed_part(request: EditRequest, size: Size, stretched: bool = False) -> Image.Image | None:
    """The mask without a soft rim, as a training row has it, 255 where the edit may go; None where there is none."""
    if request.mode in MASKED and request.mask is not None:
        return fit_mask(request.mask, size, stretched)
    return edit_mask(request, size, stretched)


def check_request(request: EditRequest, size: Size, stretched: bool = False) -> None:
    """What can be said without a model.

    Args:
        size: size of the result.

    Raises:
        InputError: the mask does not suit, or the disc is smaller than a pixel.
    """
    if request.mask is not None:
        check_mask(request.mask, request.images[0])
        if fit_mask(request.mask, size, stretched).getbbox() is None:
            raise InputError(
                "the mask is white at the picture's rim alone, which the size of the result cuts off: enlarge it"
            )
    if request.focus and request.focus.radius * min(size) < 1:
        raise InputError(
            f"a focus of radius {request.focus.radius} covers no pixel of {size.width}x{size.height}: enlarge it"
        )
