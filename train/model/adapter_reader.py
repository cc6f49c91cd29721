"""Adapter files as people write them: ours, diffusers', PEFT's, kohya's and the Lightning ones, all read to one form.

A module's key is `<prefix><module>.<kind>`. The prefix may be missing; the kinds are PEFT's `lora_A.weight`/`lora_B.weight`, or
`lora_down.weight`/`lora_up.weight` with `alpha` and maybe `dora_scale`, or LoKr's `lokr_w1` and `lokr_w2`, each of which may
be `_a` and `_b` instead. The scale alpha/rank comes from the file's `alpha`, else from the configuration that PEFT writes beside
the file or diffusers into its header, else it is 1 (it is inside B or w1, as we export it).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_file
from train.model.layers.lokr import LEFT, NAMES, RIGHT, Kronecker

PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "lora_unet_", "lycoris_")
DIFFUSERS_HEADER = "lora_adapter_metadata"
KINDS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    **{name: name for name in NAMES},
}
KEY = re.compile(r"(.+?)\.(" + "|".join(map(re.escape, sorted(KINDS, key=len, reverse=True))) + ")")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one linear module's weight: up @ down, and LoKr's products, float32."""

    down: Tensor
    """(rank, in), known as A."""
    up: Tensor
    """(out, rank), known as B, with the scale alpha/rank inside."""
    magnitude: Tensor | None = None
    """Magnitude of each output channel, (out,), for DoRA."""
    share: float = 1.0
    """How much of it counts, for DoRA; otherwise it is in `up`."""
    products: tuple[Kronecker, ...] = ()
    """The Kronecker products of LoKr, for which the rank is 0 here."""

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def num_bytes(self) -> int:
        low_rank = sum(tensor.nbytes for tensor in (self.down, self.up, self.magnitude) if tensor is not None)
        return low_rank + sum(product.num_bytes for product in self.products)

    def to(self, device: torch.device) -> "LowRank":
        """The same on a device."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        products = tuple(product.to(device) for product in self.products)
        return LowRank(self.down.to(device), self.up.to(device), magnitude, self.share, products)


def read_adapter(path: Path, linear: Mapping[str, nn.Linear]) -> dict[str, LowRank]:
    """An adapter by the names of the modules that it changes. Every tensor of the file is used.

    Args:
        path: a checkpoint folder or a safetensors file.
        linear: the transformer's linear modules by name.

    Raises:
        InputError: there is no such file, or it has a tensor that is no part of an adapter of this transformer.
    """
    file = adapter_file(path)
    names = {name: name for name in linear} | {name.replace(".", "_"): name for name in linear}  # kohya's have no dots
    found = read_parts(file, names.get)
    for name, part in found.items():
        _check_shape(file, name, part, linear[name])
    return found


def read_parts(file: Path, module_name: Callable[[str], str | None]) -> dict[str, LowRank]:
    """As `read_adapter`, of a file, for any transformer: shapes are only compared with each other.

    Args:
        module_name: the module's name for a name as it stands in a file, without its prefix; None where there is no such module.
    """
    tensors, header = _read(file)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise InputError(f"{file} is not a LoRA adapter: it cannot use its tensor {key!r}")
        module = module_name(without_prefix(match[1]))
        if module is None:
            raise InputError(f"{file} changes a module that this model lacks: its tensor {key!r} cannot be used")
        if parts.setdefault(module, {}).setdefault(KINDS[match[2]], tensor) is not tensor:
            raise InputError(f"{file} changes the module {module} twice: its tensor {key!r} is one too many")
    config = _config(file, header)
    return {
        name: (_lokr if found.keys() & set(NAMES) else _low_rank)(file, name, found, config)
        for name, found in parts.items()
    }


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error
    if not tensors:
        raise InputError(f"{file} is not a LoRA adapter: it holds no tensor")
    return tensors, header


def without_prefix(name: str) -> str:
    """A module's name without what programs put before it."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _config(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration of an adapter: beside the file, or in the header (diffusers, for the module `transformer`)."""
    beside = file.parent / CONFIG_FILE
    try:
        if DIFFUSERS_HEADER in header:
            stored = json.loads(header[DIFFUSERS_HEADER])
            return {key.removeprefix("transformer."): value for key, value in stored.items()}
        if file.name == WEIGHTS_FILE and beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"the LoRA configuration of {file} is not valid JSON ({error})") from error
    return {}


def _low_rank(file: Path, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if missing := {"down", "up"} - parts.keys():
        kind = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}[missing.pop()]
        raise InputError(f"{file} is incomplete: the module {name} has no {kind}")
    down, up = parts["down"], parts["up"]
    if (down.ndim, up.ndim) != (2, 2) or len(down) != up.shape[1]:
        raise InputError(
            f"{file} is for another model: the LoRA of {name} is {tuple(down.shape)} and {tuple(up.shape)}, which are no two "
            "matrices of one rank"
        )
    magnitude = parts.get("magnitude")
    if magnitude is not None and magnitude.shape[:-1].numel() == 1 < magnitude.ndim:
        raise InputError(f"{file} scales the inputs of {name}, which cannot be loaded: DoRA here scales the outputs")
    scale = _scale(name, len(down), parts.get("alpha"), config)
    return LowRank(down, up if scale == 1 else up * scale, magnitude)


def _check_shape(file: Path, name: str, part: LowRank, module: nn.Linear) -> None:
    sides = (module.out_features, module.in_features)
    for product in part.products:
        if product.shape != sides:
            raise InputError(
                f"{file} is for another model: the LoKr of {name} makes a weight of {product.shape[1]} to {product.shape[0]} "
                f"numbers, the module takes {module.in_features} and gives {module.out_features}"
            )
    if (len(part.up), part.down.shape[1]) != sides:
        raise InputError(
            f"{file} is for another model: the LoRA of {name} is {tuple(part.down.shape)} and {tuple(part.up.shape)}, "
            f"the module takes {module.in_features} numbers and gives {module.out_features}"
        )
    if part.magnitude is not None and part.magnitude.numel() != module.out_features:
        raise InputError(f"{file} is for another model: the magnitude of {name} has {part.magnitude.numel()} numbers")


def _lokr(file: Path, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    """`alpha` is divided by the rank of the factor that is a product, the last of two, and means nothing where none is: as
    LyCORIS and ComfyUI have it. PEFT's own files have it in their configuration, and it always counts."""
    if parts.keys() & {"down", "up", "magnitude"}:
        raise InputError(f"{file} has both LoRA and LoKr in the module {name}, which cannot be loaded")
    factors = []
    for side in (LEFT, RIGHT):
        whole, pair = parts.get(side), [parts[key] for key in (f"{side}_a", f"{side}_b") if key in parts]
        if (whole is None) != (len(pair) == 2) or any(
            weight.ndim != 2 for weight in (whole, *pair) if weight is not None
        ):
            raise InputError(
                f"{file} is incomplete: the module {name} has no {side}, or not both {side}_a and {side}_b"
            )
        factors.append(tuple(pair) if whole is None else (whole,))
    product = Kronecker(*factors)
    if any(len(pair) == 2 and pair[0].shape[1] != len(pair[1]) for pair in factors):
        raise InputError(f"{file} is broken: the two matrices of a factor of the LoKr of {name} do not fit each other")
    scale, ranks = 1.0, [len(factor[1]) for factor in factors if len(factor) == 2]
    if "alpha" in parts:
        scale = parts["alpha"].item() / ranks[-1] if ranks else 1.0
    elif config.get("peft_type") == "LOKR":
        alpha, rank = (_of_pattern(config, name, *keys) for keys in (("alpha_pattern", "alpha"), ("rank_pattern", "r")))
        scale = alpha / rank
    down, up = product.left[0].new_zeros(0, product.shape[1]), product.left[0].new_zeros(product.shape[0], 0)
    return LowRank(down, up, products=(product.scaled(scale),))


def _of_pattern(config: Mapping[str, Any], name: str, pattern: str, default: str) -> Any:
    """What PEFT's configuration has for a module."""
    values = config.get(pattern) or {}
    return values.get(get_pattern_key(list(values), name), config.get(default))


def _scale(name: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
    if alpha is not None:
        return alpha.item() / rank
    set_here = _of_pattern(config, name, "alpha_pattern", "lora_alpha")
    if set_here is None:
        return 1.0
    return set_here / (rank**0.5 if config.get("use_rslora") else rank)


def linear_modules(dit: nn.Module) -> dict[str, nn.Linear]:
    """The transformer's linear modules by their name, without those that adapters brought."""
    found = {name: module for name, module in dit.named_modules() if isinstance(module, nn.Linear)}
    return {name.replace(".base_layer", ""): module for name, module in found.items() if ".lora_" not in name}


def ends_in(name: str, suffix: str) -> bool:
    """Whether the last parts of a module's name are these."""
    return name == suffix or name.endswith(f".{suffix}")


def low_rank_sum(parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    """The weighted sum as one adapter: its A are all A above each other, its B all weighted B beside each other.

    DoRA is no such product; it is alone, and its weight becomes its share.
    """
    if len(parts) == 1 and (parts[0][1] == 1 or parts[0][0].magnitude is not None):
        return replace(parts[0][0], share=parts[0][1])
    down = torch.cat([part.down for part, _ in parts])
    products = tuple(product.scaled(weight) for part, weight in parts for product in part.products)
    return LowRank(down, torch.cat([part.up * weight for part, weight in parts], dim=1), products=products)


def fused_weight(weight: Tensor, part: LowRank) -> Tensor:
    """A linear module's weight with an adapter inside, (out, in), float32.

    Args:
        weight: without, (out, in).

    Returns:
        weight + up @ down, and LoKr's products; with DoRA the share of the way to
        m (weight + up @ down) / ‖weight + up @ down‖, whose rows have the lengths m (arXiv 2402.09353, eq. 5).
    """
    part, plain = part.to(weight.device), weight.float()
    moved = torch.addmm(plain, part.up, part.down)
    for product in part.products:
        moved += product.weight()
    if part.magnitude is None:
        return moved
    scaled = moved * (part.magnitude.view(-1, 1) / torch.linalg.vector_norm(moved, dim=1, keepdim=True))
    return torch.lerp(plain, scaled, part.share)


def fused(
    paths: Sequence[Path], linear: Mapping[str, nn.Linear], device: torch.device | str
) -> Callable[[str, Tensor], Tensor]:
    """A function of a weight's name and the weight, (out, in), that returns it with the adapters added, float32.

    Raises:
        InputError: a file is no adapter of this transformer, or a DoRA adapter is among several.
    """
    adapters = [read_adapter(path, linear) for path in paths]
    for path, adapter in zip(paths, adapters, strict=True):
        if len(paths) > 1 and any(part.magnitude is not None for part in adapter.values()):
            raise InputError(
                f"{path} is a DoRA adapter, which rescales the weights and cannot be added to others: use it alone"
            )

    def change(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        parts = [(adapter[module], 1.0) for adapter in adapters if module in adapter] if name != module else []
        return fused_weight(weight.to(device), low_rank_sum(parts)) if parts else weight

    return change
