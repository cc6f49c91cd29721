"""LoRA or LoKr on the transformer: attaching, and exporting in the one form that diffusers, DiffSynth and ComfyUI all load.

Exported keys are `diffusion_model.<module>.lora_A.weight` and `.lora_B.weight` with the scale alpha/rank inside B.
Measured: bare keys load 0 modules in diffusers without a word, and `transformer.` keys fuse 0 modules in DiffSynth.
LoKr has `.lokr_w1` and `.lokr_w2`, or `_a` and `_b` of a product, with the scale inside w1 and an `.alpha` that leaves it at 1:
ComfyUI loads that, and diffusers' converter for Qwen-Image refuses it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lokr import Linear as PeftLokr
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from train.model.adapter_reader import LowRank, ends_in, fused_weight, linear_modules
from train.model.block import UNUSED_IN_LAST_BLOCK
from train.model.denoiser import Denoiser
from train.model.extra.extras import Extras, ExtraWeights
from train.model.extra.whole import trained_modules
from train.model.layers.lokr import LEFT, Kronecker, LokrLinear, lokr_config
from train.model.layers.lora import LoraLinear, give_copies, is_plain

Value = TypeVar("Value")
PREFIX = "diffusion_model."
NO_PATTERN = "adapter.rank_pattern=null, as adapter=lora has it"


@dataclass
class Adapter:
    """LoRA or LoKr layers that live inside a denoiser.

    `layers` maps the module's name in the transformer to its layer; `config` is what PEFT built them from; `masters`
    are the weights that are trained when they are not the layers' own (see `detach`); `copies` are what products are
    computed with, and the weights that belong in them (see `copy_for_products`); `beneath` are frozen adapters that `export`
    puts into the file; `extras` are trained beside LoRA.
    """

    layers: dict[str, Any]
    config: LoraConfig | LoKrConfig
    masters: dict[str, nn.Parameter] | None = None
    copies: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    beneath: list[dict[str, LowRank]] = field(default_factory=list)
    extras: Extras = field(default_factory=Extras)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<module>.lora_A.weight`, `.lora_B.weight` and, with DoRA, `.lora_magnitude_vector.weight` -> float32 parameter; of
        LoKr `<module>.lokr_w1` or `.lokr_w1_a` and `.lokr_w1_b`, and the same of w2; then those of `extras`."""
        return self.layer_parameters() if self.masters is None else self.masters

    def layer_parameters(self) -> dict[str, nn.Parameter]:
        """The same of the layers themselves."""
        named = {}
        for name, layer in self.layers.items():
            if isinstance(layer, LokrLinear):
                named |= {f"{name}.{part}": weight for part, weight in layer.named_factors().items()}
                continue
            named[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight
            named[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight
            if self.dora:
                named[f"{name}.lora_magnitude_vector.weight"] = layer.lora_magnitude_vector["default"].weight
        return named | self.extras.parameters

    @property
    def dora(self) -> bool:
        """Whether magnitudes are trained too."""
        return isinstance(self.config, LoraConfig) and bool(self.config.use_dora)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains, in a fixed order."""
        return list(self.named_parameters().values())

    def detach(self, device: torch.device | str) -> None:
        """From now on the adapter's weights are copies on `device`; `refresh` brings them to the layers."""
        own = self.named_parameters()
        self.masters = {name: nn.Parameter(weight.detach().to(device, copy=True)) for name, weight in own.items()}

    def copy_for_products(self, blocks: Iterable[Any], dtype: torch.dtype) -> None:
        """Gives the layers their weights in the model's dtype, to be multiplied by; `refresh` keeps them up to date.

        Args:
            blocks: blocks of the transformer (`Block`); they say which layers read the same input.
        """
        plain = {layer: None for layer in self.layers.values() if is_plain(layer)}
        groups = [group for block in blocks for group in block.inputs if all(layer in plain for layer in group)]
        grouped = {layer for group in groups for layer in group}
        self.copies = give_copies([*groups, *([layer] for layer in plain if layer not in grouped)], dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the layers' weights, and their copies for products, what the adapter's weights are. Whoever changes those calls
        it: `load_state_dict`, and `train.parallel` after the optimizer."""
        if self.masters is not None:
            torch._foreach_copy_(list(self.layer_parameters().values()), list(self.masters.values()))  # pyright: ignore
        if self.copies[0]:
            torch._foreach_copy_(*self.copies)  # pyright: ignore

    def take_gradients(self) -> None:
        """Moves the layers' gradients to the masters, where there are such."""
        if self.masters is None:
            return
        for name, parameter in self.layer_parameters().items():
            master = self.masters[name]
            master.grad = None if parameter.grad is None else parameter.grad.to(master.device)
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The exact training weights, unscaled, for resuming."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned, bit for bit.

        Raises:
            InputError: the names or shapes differ from this adapter's.
        """
        mine = self.named_parameters()
        wrong = sorted(mine.keys() ^ state.keys()) or [n for n in mine if mine[n].shape != state[n].shape]
        if wrong:
            by_pattern = all(
                re.split(r"\.(?:lora|lokr)_", name)[0] in (self.config.rank_pattern or {}) for name in wrong
            )
            keys = "adapter.rank, rank_pattern, target_modules, train_modules and modules as they were"
            raise InputError(
                f"the checkpoint's LoRA differs from the configured one in {len(wrong)} tensors, first {wrong[0]}: set "
                f"{NO_PATTERN + ', or the pattern that it had' if by_pattern else keys}, or start a new run_dir"
            )
        for name, parameter in mine.items():
            parameter.copy_(state[name])
        self.refresh()

    @torch.no_grad()
    def start_from(self, path: Path, parts: Mapping[str, LowRank], extra: ExtraWeights | None = None) -> None:
        """Makes this adapter compute what another does. What has a larger rank here keeps its own A there, with B zero; what is
        trained in full here gets the other, of whatever kind, into its weight.

        Args:
            path: path of the other's file, for messages.
            parts: parts of the other, by module (`read_adapter`).
            extra: modules beside LoRA of the other (`read_extras`).

        Raises:
            InputError: the other has a module that this one lacks, or more rank, or only one of them has DoRA or LoKr in a layer.
        """
        mine = self.named_parameters()
        if extra:
            self.extras.start_from(extra)
        for name, part in parts.items():
            if name not in self.layers and (weight := mine.get(f"{name}.weight")) is not None:
                weight.copy_(fused_weight(weight, part))
                continue
            if name not in self.layers:
                raise InputError(
                    f"{path} changes {name}, which adapter.target_modules leaves out: add it, or start from another"
                )
            if bool(part.products) != isinstance(self.layers[name], LokrLinear):
                kinds = ("LoKr", "lora") if part.products else ("LoRA", "lokr")
                raise InputError(f"{path} is a {kinds[0]} adapter, and adapter.kind is {kinds[1]}: make them the same")
            own = {key.removeprefix(f"{name}."): weight for key, weight in mine.items() if key.startswith(f"{name}.")}
            scale = self.layers[name].scaling["default"]
            if part.products:
                self._start_lokr(path, name, own, part.products[0].scaled(1 / scale))
            else:
                self._start_lora(path, name, own, part, scale)

    def _start_lora(self, path: Path, name: str, own: dict[str, nn.Parameter], part: LowRank, scale: float) -> None:
        down, up = own["lora_A.weight"], own["lora_B.weight"]
        if part.rank > len(down):
            raise self._more_rank(path, name, part.rank, len(down))
        if (part.magnitude is not None) != self.dora:
            raise InputError(
                f"{path} is {'a' if part.magnitude is not None else 'no'} DoRA adapter, and adapter.dora is "
                f"{str(self.dora).lower()}: make them the same"
            )
        down[: part.rank] = part.down.to(down.device)
        up[:, : part.rank] = part.up.to(up.device) / scale
        if part.magnitude is not None:
            magnitude = own["lora_magnitude_vector.weight"]
            magnitude.copy_(part.magnitude.view_as(magnitude))

    def _start_lokr(self, path: Path, name: str, own: dict[str, nn.Parameter], product: Kronecker) -> None:
        """Gives a layer's factors these values. A product of a larger rank keeps what it has more of, times zero."""
        for side, factor in ("lokr_w1", product.left), ("lokr_w2", product.right):
            mine = [weight for key, weight in own.items() if key.startswith(side)]
            sides, theirs = (len(mine[0]), mine[-1].shape[1]), (len(factor[0]), factor[-1].shape[1])
            if len(mine) != len(factor) or sides != theirs:
                raise InputError(
                    f"{path} has a different {side} in {name}, {_described(factor)} instead of {_described(mine)}: set "
                    "adapter.rank, decompose_both and decompose_factor as in its training"
                )
            if len(mine) == 1:
                mine[0].copy_(factor[0])
                continue
            rank = len(factor[1])
            if rank > len(mine[1]):
                raise self._more_rank(path, name, rank, len(mine[1]))
            mine[0][:, :rank], mine[1][:rank], mine[1][rank:] = factor[0], factor[1], 0.0

    def _more_rank(self, path: Path, name: str, rank: int, own: int) -> InputError:
        why, mend = "here", f"adapter.rank={rank}, or adapter.rank_pattern for it"
        if name in (self.config.rank_pattern or {}):
            less = f" with adapter.rank={rank}" if rank > self.config.r else ""
            why = "that adapter.rank_pattern gives it"
            mend = f"{NO_PATTERN}{less}, or at least {rank} for this layer there"
        return InputError(f"{path} has rank {rank} in {name}, more than the {own} {why}: set {mend}")

    @torch.no_grad()
    def export(self, folder: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
        """Writes `adapter_model.safetensors` (with `metadata` in its header) and `adapter_config.json` into `folder`, and beside
        them `extra_modules.safetensors` where there is more than LoRA."""
        tensors, state = {}, self.state_dict()
        metadata = metadata | self.extras.header()
        for name, tensor in state.items():
            if name in self.extras.parameters:
                continue
            module, kind = _parts_of(name)
            scaled = kind in ("lora_B.weight", LEFT, f"{LEFT}_a")
            scale = self.layers[module].scaling["default"] if scaled else 1.0
            tensors[PREFIX + name] = (tensor * scale).to("cpu", dtype).contiguous()
        for module, part in [pair for adapter in self.beneath for pair in adapter.items()]:
            for kind, dim, more in ("A", 0, part.down), ("B", 1, part.up):
                key, more = f"{PREFIX}{module}.lora_{kind}.weight", more.to("cpu", dtype)
                tensors[key] = torch.cat([tensors[key], more], dim=dim) if key in tensors else more.contiguous()
        ranks = {
            key.split(".lora_")[0].removeprefix(PREFIX): len(each) for key, each in tensors.items() if ".lora_A." in key
        }
        if isinstance(self.config, LoKrConfig):
            ranks = {name: layer.r["default"] for name, layer in self.layers.items()}
            tensors |= {f"{PREFIX}{name}.alpha": torch.tensor(float(rank)) for name, rank in ranks.items()}
        others = {name: rank for name, rank in ranks.items() if rank != self.config.r}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata})
        unscaled = {"lora_alpha": self.config.r, "use_rslora": False}  # the scale is inside B, or w1
        config = self.config.to_dict() | {
            **({"alpha": self.config.r} if isinstance(self.config, LoKrConfig) else unscaled),
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
            "base_model_name_or_path": metadata.get("base_model"),
        }
        text = json.dumps(config, indent=2, sort_keys=True, default=lambda value: sorted(value))
        (folder / CONFIG_FILE).write_text(text + "\n")
        self.extras.export(folder, state, metadata, dtype)


def attach_lora(
    denoiser: Denoiser,
    rank: int,
    alpha: float | None,
    target_modules: Sequence[str],
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    train_modules: Sequence[str] = (),
) -> Adapter:
    """Injects trainable LoRA layers into the denoiser's transformer; B starts at zero, so nothing changes yet.

    Args:
        alpha: the scale is alpha / rank, which is that of all modules without a value in `alpha_pattern`; None: 1.
        target_modules: suffixes of linear modules' names, such as `to_q` or `img_mlp.net.2`.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732).
        dora: learn the magnitude of each output channel too (Liu et al. 2024, arXiv 2402.09353).
        seed: random seed of A's initialisation, which depends on each module's name and on nothing else.
        rank_pattern, alpha_pattern: suffix of modules' names -> another rank or alpha for them; see `by_suffix`.
        train_modules: suffixes of names of modules that get none, since they are trained in full (`attach_extras`).

    Raises:
        InputError: a target or a pattern matches no linear module.
    """
    names = match_modules(denoiser.dit, target_modules, train_modules)
    ranks, alphas = ranks_and_alphas(denoiser.dit, names, rank, alpha, rank_pattern, alpha_pattern)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,  # pyright: ignore  # PEFT says int, and computes with any number
        target_modules=names,
        use_rslora=rslora,
        use_dora=dora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    adapter = inject(denoiser, config, names)
    parameters = adapter.named_parameters()
    for name in names:
        parameters[f"{name}.lora_A.weight"].data.copy_(_start(seed, name, parameters[f"{name}.lora_A.weight"]))
    return adapter


def attach_lokr(
    denoiser: Denoiser,
    rank: int,
    alpha: float | None,
    target_modules: Sequence[str],
    decompose_both: bool = False,
    decompose_factor: int = -1,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    train_modules: Sequence[str] = (),
) -> Adapter:
    """Injects trainable LoKr layers in the same way; w2 starts at zero, so nothing changes yet.

    Args:
        decompose_both: w1 is a product of two matrices too, where the rank is below half its longer side.
        decompose_factor: the shorter side of w1, where it divides the layer's; -1: near the square root.

    Raises:
        InputError: as `attach_lora`.
    """
    names = match_modules(denoiser.dit, target_modules, train_modules)
    ranks, alphas = ranks_and_alphas(denoiser.dit, names, rank, alpha, rank_pattern, alpha_pattern)
    options = {"alpha": alpha or rank, "target_modules": names, "rank_pattern": ranks, "alpha_pattern": alphas}
    adapter = inject(denoiser, lokr_config(rank, decompose_both, decompose_factor, **options), names)
    for name, weight in adapter.named_parameters().items():
        if not name.endswith((".lokr_w2", ".lokr_w2_b")):  # these are zero
            weight.data.copy_(_start(seed, name, weight))
    return adapter


def ranks_and_alphas(
    dit: nn.Module,
    names: Sequence[str],
    rank: int,
    alpha: float | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
) -> tuple[dict[str, int], dict[str, Any]]:
    """By module, where they are other ones than `rank` and `alpha`. Where no pattern sets alpha, alpha / rank is the same."""
    known = linear_modules(dit)
    ranks = by_suffix(names, rank_pattern or {}, rank, "adapter.rank_pattern", known)
    alphas: dict[str, Any] = by_suffix(names, alpha_pattern or {}, None, "adapter.alpha_pattern", known)
    default = {name: own if alpha is None else alpha * own / rank for name, own in ranks.items()}
    alphas = {name: default[name] if own is None else own for name, own in alphas.items()}
    return (
        {name: own for name, own in ranks.items() if own != rank},
        {name: own for name, own in alphas.items() if own != (alpha or rank)},
    )


def _start(seed: int, name: str, like: Tensor) -> Tensor:
    """Kaiming's uniform start of a matrix, by the run's seed and a name alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return nn.init.kaiming_uniform_(torch.empty(*like.shape), a=5**0.5, generator=generator)


def _described(factor: Sequence[Tensor]) -> str:
    return " x ".join(f"({len(weight)}, {weight.shape[1]})" for weight in factor)


def _parts_of(name: str) -> tuple[str, str]:
    """A trained weight's module, and the rest of its name."""
    module, kind, rest = re.split(r"\.(lora_|lokr_)", name)
    return module, kind + rest


def match_modules(dit: nn.Module, target_modules: Iterable[str], train_modules: Iterable[str] = ()) -> list[str]:
    """Names of the linear modules that end in one of the targets, without those whose output nothing reads, and without those
    that are trained in full.

    Raises:
        InputError: a target matches no linear module, or nothing is left for LoRA.
    """
    linear = [name for name, module in dit.named_modules() if isinstance(module, nn.Linear)]
    last = max(int(name.split(".")[1]) for name in linear if name.startswith("transformer_blocks."))
    unused = {f"transformer_blocks.{last}.{suffix}" for suffix in UNUSED_IN_LAST_BLOCK}
    matched = set()
    for target in target_modules:
        hits = {name for name in linear if ends_in(name, target)}
        if not hits:
            valid = sorted({name.split(".", 2)[-1] for name in linear} | {name.rsplit(".", 1)[-1] for name in linear})
            nearest = difflib.get_close_matches(target, valid, n=1, cutoff=0.0)[0]
            raise InputError(
                f"adapter.target_modules names {target!r}, which is not a linear module: did you mean {nearest!r}?"
            )
        matched |= hits
    in_full = trained_modules(dit, train_modules)
    inside = tuple(f"{name}." for name in in_full)
    left = [name for name in linear if name in matched - unused - {*in_full} and not name.startswith(inside)]
    if not left:
        raise InputError(
            "adapter.train_modules covers all of adapter.target_modules, but LoRA needs at least one module"
        )
    return left


def by_suffix(
    names: Sequence[str], pattern: Mapping[str, Value], default: Value, key: str, known: Iterable[str]
) -> dict[str, Value]:
    """For each module the value of the longest suffix that its name ends in, or the default.

    Args:
        key: where the pattern stands in the configuration.
        known: names of all linear modules: a pattern may name some that no target does.

    Raises:
        InputError: the name of no known module ends in a suffix.
    """
    known = list(known)
    for suffix in pattern:
        if not any(ends_in(name, suffix) for name in known):
            raise InputError(f"{key} names {suffix!r}, but no linear layer's name ends in it")
    longest_first = sorted(pattern, key=len, reverse=True)
    return {
        name: next((pattern[suffix] for suffix in longest_first if ends_in(name, suffix)), default) for name in names
    }


def inject(denoiser: Denoiser, config: LoraConfig | LoKrConfig, names: list[str]) -> Adapter:
    """Injects PEFT's layers in float32 and asserts that exactly `names` were touched."""
    # PEFT initialises from the global generator, and DoRA's magnitudes from the frozen weights
    with torch.random.fork_rng(devices=[]), denoiser.weights_at_rest():
        inject_adapter_in_model(config, denoiser.dit)
    layers = {name: module for name, module in denoiser.dit.named_modules() if isinstance(module, BaseTunerLayer)}
    assert sorted(layers) == sorted(names), f"the adapter touched {len(layers)} modules instead of {len(names)}"
    for layer in layers.values():
        if ours := {PeftLinear: LoraLinear, PeftLokr: LokrLinear}.get(type(layer)):
            layer.__class__ = ours
    adapter = Adapter({name: layers[name] for name in names}, config)
    device = denoiser.dit.img_in.weight.device  # not that of the frozen weights, which may wait elsewhere
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(device, torch.float32)
        parameter.requires_grad_(True)
    return adapter
