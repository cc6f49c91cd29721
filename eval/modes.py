"""What each mode means: a sampler, its steps, and the parts of the picture it may change."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from data_prep.errors import InputError
from data_prep.geometry import Geometry, Size, bucket_size, fit_mask
from eval.inversion import InversionSampler
from eval.masks import check_mask, focus_mask, soft_mask
from eval.metadata import BRIDGE_STEPS, FLOW_CFG_SCALE, FLOW_STEPS, trained_bridge
from eval.request import ASPECTS, MASKED, EditRequest, Focus, SamplerName
from eval.samplers import BridgeSampler, FlowSampler, Sampler

LIGHTNING_STEPS = 4
INVERSION_STEPS = 20
DEFAULT_STRENGTHS = {"img2img": 0.6, "variation": 0.6, "invert": 0.8}
"""Of the modes that begin at the source; the others walk the whole way."""
BRIDGES = ("bridge", "bridge-white", "bridge-stochastic")
FROM_NOISE = ("img2img", "variation", "invert")
"""Modes that need the way from noise."""


@dataclass(frozen=True)
class Plan:
    """How a request is sampled."""

    name: SamplerName
    sampler: Sampler
    steps: int


def make_plan(request: EditRequest, metadata: Mapping[str, str]) -> Plan:
    """The sampler and its steps: what the request says, and else what suits its mode and its first adapter.

    Args:
        metadata: of the first adapter's file; empty without one.

    Raises:
        InputError: the adapter cannot be sampled as asked.
    """
    plan = _plan(request, metadata)
    if request.count > 1 and not plan.sampler.draws:
        raise InputError(
            f"mode={request.mode} with sampler={plan.name} draws nothing, so that all {request.count} pictures would be the "
            "same: leave out count" + (", or use sampler=bridge-stochastic" if plan.name in BRIDGES else "")
        )
    return plan


def _plan(request: EditRequest, metadata: Mapping[str, str]) -> Plan:
    name = _sampler_name(request, metadata)
    if name in BRIDGES:
        return Plan(name, _bridge(request, name, metadata), request.steps or BRIDGE_STEPS)
    lightning = name == "lightning"
    default_steps = LIGHTNING_STEPS if lightning else FLOW_STEPS
    scale = request.cfg_scale or (1.0 if lightning else FLOW_CFG_SCALE)
    sampler = FlowSampler(scale, shift="lightning" if lightning else "qwen")
    strength = request.strength or DEFAULT_STRENGTHS.get(request.mode, 1.0)
    if request.mode == "invert":
        return Plan(name, InversionSampler(sampler, strength), request.steps or INVERSION_STEPS)
    return Plan(name, replace(sampler, strength=strength), request.steps or default_steps)


def _sampler_name(request: EditRequest, metadata: Mapping[str, str]) -> SamplerName:
    objective = metadata.get("objective", "flow")
    if objective not in ("flow", "lbm"):
        raise InputError(f"the adapter's objective is {objective!r}; this version samples 'lbm' and 'flow'")
    bridge = objective == "lbm"
    if request.mode == "turbo" and not request.adapters:
        raise InputError(
            "mode=turbo needs an adapter that edits in a few steps: a step-distilled one (Lightning) or a bridge"
        )
    if bridge and request.mode in FROM_NOISE:
        raise InputError(
            f"mode={request.mode} starts from noise, and the adapter is a bridge (objective lbm): use mode=edit"
        )
    if bridge:
        own = "bridge-white" if trained_bridge(metadata).get("sub_prob") == 1 else "bridge"
    else:
        own = "lightning" if request.mode == "turbo" else "flow"
    name = request.sampler or own
    if (name in BRIDGES) != bridge:
        why = (
            "does not suit a bridge (objective lbm)" if bridge else "needs an adapter that is a bridge (objective lbm)"
        )
        raise InputError(f"sampler={name} {why}: leave it out, or use sampler={own}")
    return name


def _bridge(request: EditRequest, name: SamplerName, metadata: Mapping[str, str]) -> BridgeSampler:
    if request.cfg_scale not in (None, 1.0):
        raise InputError(
            f"a bridge (objective lbm) is sampled without guidance: leave out cfg_scale={request.cfg_scale}"
        )
    if request.strength not in (None, 1.0):
        raise InputError(f"a bridge is walked whole: leave out strength={request.strength}")
    loss = trained_bridge(metadata)
    if name == "bridge-white" and loss.get("sub_prob") == 0:
        raise InputError("sampler=bridge-white needs a sub stream, and the adapter was trained without (sub_prob=0)")
    return BridgeSampler(
        start="white" if name == "bridge-white" else "source",
        stochastic=name == "bridge-stochastic",
        bridge_noise=loss.get("bridge_noise", 0.0),
        prediction=loss.get("prediction", "displacement"),
    )


def result_size(request: EditRequest, geometry: Geometry) -> Size:
    """Of the pictures: the request's, or as many pixels as the source has in the request's aspect, or as the source."""
    if request.size:
        return request.size
    own = geometry.target_size(Size.of(request.images[0]))
    if not request.aspect:
        return own
    height = (own.height * own.width / ASPECTS[request.aspect]) ** 0.5
    wanted = Size(round(height), round(height * ASPECTS[request.aspect]))
    return bucket_size(wanted, max_pixels=max(geometry.max_pixels, own.height * own.width))


def edit_mask(request: EditRequest, size: Size) -> Image.Image | None:
    """The soft mask at the result's size, 255 where the edit may go, or None where it may go everywhere."""
    if request.mode == "focus":
        return focus_mask(size, request.focus or Focus())
    if request.mode not in MASKED:
        return None
    assert request.mask is not None
    return soft_mask(fit_mask(request.mask, size), request.feather)


def check_request(request: EditRequest) -> None:
    """What can be said without a model.

    Raises:
        InputError: the mask does not suit.
    """
    if request.mask is not None:
        check_mask(request.mask, request.images[0])
