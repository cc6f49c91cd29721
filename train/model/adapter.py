"""LoRA on the transformer: attaching, and exporting in the one form that diffusers, DiffSynth and ComfyUI all load.

Exported keys are `diffusion_model.<module>.lora_A.weight` and `.lora_B.weight` with the scale alpha/rank inside B.
Measured: bare keys load 0 modules in diffusers without a word, and `transformer.` keys fuse 0 modules in DiffSynth.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from train.model.adapter_reader import LowRank, ends_in
from train.model.block import UNUSED_IN_LAST_BLOCK
from train.model.denoiser import Denoiser
from train.model.extra.extras import Extras, ExtraWeights
from train.model.extra.whole import trained_modules
from train.model.layers.lora import LoraLinear, give_copies, is_plain

Value = TypeVar("Value")
PREFIX = "diffusion_model."


@dataclass
class Adapter:
    """LoRA layers that live inside a denoiser.

    `layers` maps the module's name in the transformer to its LoRA layer; `config` is what PEFT built them from; `masters`
    are the weights that are trained when they are not the layers' own (see `detach`); `copies` are what products are
    computed with, and the weights that belong in them (see `copy_for_products`); `beneath` are frozen adapters that `export`
    puts into the file; `extras` are trained beside LoRA.
    """

    layers: dict[str, LoraLayer]
    config: LoraConfig
    masters: dict[str, nn.Parameter] | None = None
    copies: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    beneath: list[dict[str, LowRank]] = field(default_factory=list)
    extras: Extras = field(default_factory=Extras)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<module>.lora_A.weight`, `.lora_B.weight` and, with DoRA, `.lora_magnitude_vector.weight` -> float32 parameter; then
        those of `extras`."""
        return self.layer_parameters() if self.masters is None else self.masters

    def layer_parameters(self) -> dict[str, nn.Parameter]:
        """The same of the layers themselves."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight
            named[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight
            if self.config.use_dora:
                named[f"{name}.lora_magnitude_vector.weight"] = layer.lora_magnitude_vector["default"].weight
        return named | self.extras.parameters

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
            blocks: of the transformer (`Block`); they say which layers read the same input.
        """
        plain = {layer: None for layer in self.layers.values() if is_plain(layer)}
        groups = [group for block in blocks for group in block.inputs if all(layer in plain for layer in group)]
        grouped = {layer for group in groups for layer in group}
        self.copies = give_copies([*groups, *([layer] for layer in plain if layer not in grouped)], dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the layers' weights, and their copies for products, what the adapter's weights are."""
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
            raise InputError(
                f"the checkpoint's LoRA differs from the configured one in {len(wrong)} tensors, first {wrong[0]}: "
                "set adapter.rank, target_modules, train_modules and modules as they were, or start a new run_dir"
            )
        for name, parameter in mine.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def start_from(self, path: Path, parts: Mapping[str, LowRank], extra: ExtraWeights | None = None) -> None:
        """Makes this adapter compute what another does. What has a larger rank here keeps its own A there, with B zero; what is
        trained in full here gets the product into its weight.

        Args:
            path: of the other's file, for messages.
            parts: of the other, by module (`read_adapter`).
            extra: of the other (`read_extras`).

        Raises:
            InputError: the other has a module that this one lacks, or more rank, or only one of them is a DoRA adapter.
        """
        mine = self.named_parameters()
        if extra:
            self.extras.start_from(extra)
        for name, part in parts.items():
            if name not in self.layers and f"{name}.weight" in mine and part.magnitude is None:
                weight = mine[f"{name}.weight"]
                weight.add_(part.up.to(weight.device) @ part.down.to(weight.device))
                continue
            if name not in self.layers:
                raise InputError(
                    f"{path} changes {name}, which adapter.target_modules leaves out: add it, or start from another"
                )
            down, up = mine[f"{name}.lora_A.weight"], mine[f"{name}.lora_B.weight"]
            if part.rank > len(down):
                raise InputError(
                    f"{path} has rank {part.rank} in {name}, more than the {len(down)} here: set adapter.rank={part.rank}, or "
                    "adapter.rank_pattern for it"
                )
            if (part.magnitude is not None) != self.config.use_dora:
                raise InputError(
                    f"{path} is {'a' if part.magnitude is not None else 'no'} DoRA adapter, and adapter.dora is "
                    f"{str(self.config.use_dora).lower()}: make them the same"
                )
            down[: part.rank] = part.down.to(down.device)
            up[:, : part.rank] = part.up.to(up.device) / self.layers[name].scaling["default"]
            if part.magnitude is not None:
                magnitude = mine[f"{name}.lora_magnitude_vector.weight"]
                magnitude.copy_(part.magnitude.view_as(magnitude))

    @torch.no_grad()
    def export(self, folder: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
        """Writes `adapter_model.safetensors` (with `metadata` in its header) and `adapter_config.json` into `folder`, and beside
        them `extra_modules.safetensors` where there is more than LoRA."""
        tensors, state = {}, self.state_dict()
        metadata = metadata | self.extras.header()
        for name, tensor in state.items():
            if name in self.extras.parameters:
                continue
            module, kind = name.split(".lora_")
            scale = self.layers[module].scaling["default"] if kind.startswith("B.") else 1.0
            tensors[PREFIX + name] = (tensor * scale).to("cpu", dtype).contiguous()
        for module, part in [pair for adapter in self.beneath for pair in adapter.items()]:
            for kind, dim, more in ("A", 0, part.down), ("B", 1, part.up):
                key, more = f"{PREFIX}{module}.lora_{kind}.weight", more.to("cpu", dtype)
                tensors[key] = torch.cat([tensors[key], more], dim=dim) if key in tensors else more.contiguous()
        ranks = {
            key.split(".lora_")[0].removeprefix(PREFIX): len(each) for key, each in tensors.items() if ".lora_A." in key
        }
        others = {name: rank for name, rank in ranks.items() if rank != self.config.r}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata})
        config = self.config.to_dict() | {
            "lora_alpha": self.config.r,  # the scale is inside B
            "rank_pattern": others,
            "alpha_pattern": others,
            "use_rslora": False,
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
        alpha: the scale is alpha / rank; None: 1, whatever the rank of a module.
        target_modules: suffixes of linear modules' names, such as `to_q` or `img_mlp.net.2`.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732).
        dora: learn the magnitude of each output channel too (Liu et al. 2024, arXiv 2402.09353).
        seed: of A's initialisation, which depends on each module's name and on nothing else.
        rank_pattern, alpha_pattern: suffix of modules' names -> another rank or alpha for them; see `by_suffix`.
        train_modules: suffixes of names of modules that get none, since they are trained in full (`attach_extras`).

    Raises:
        InputError: a target matches no linear module, or a pattern no target.
    """
    names = match_modules(denoiser.dit, target_modules, train_modules)
    ranks = by_suffix(names, rank_pattern or {}, rank, "adapter.rank_pattern")
    alphas: dict[str, Any] = by_suffix(names, alpha_pattern or {}, alpha, "adapter.alpha_pattern")
    alphas = {name: ranks[name] if own is None else own for name, own in alphas.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,  # pyright: ignore  # PEFT says int, and computes with any number
        target_modules=names,
        use_rslora=rslora,
        use_dora=dora,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != (alpha or rank)},
    )
    adapter = inject_lora(denoiser, config, names)
    parameters = adapter.named_parameters()
    for name in names:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        weight = parameters[f"{name}.lora_A.weight"]
        start = torch.empty(*weight.shape)
        nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
        weight.data.copy_(start)
    return adapter


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
                f"adapter.target_modules names {target!r}, which is no linear module: did you mean {nearest!r}?"
            )
        matched |= hits
    in_full = trained_modules(dit, train_modules)
    inside = tuple(f"{name}." for name in in_full)
    left = [name for name in linear if name in matched - unused - {*in_full} and not name.startswith(inside)]
    if not left:
        raise InputError(
            "adapter.train_modules takes all of adapter.target_modules, and LoRA needs at least one module"
        )
    return left


def by_suffix(names: Sequence[str], pattern: Mapping[str, Value], default: Value, key: str) -> dict[str, Value]:
    """For each module the value of the longest suffix that its name ends in, or the default.

    Args:
        key: where the pattern stands in the configuration.

    Raises:
        InputError: no module's name ends in a suffix.
    """
    for suffix in pattern:
        if not any(ends_in(name, suffix) for name in names):
            raise InputError(
                f"{key} names {suffix!r}, in which the name of no module with LoRA ends: see adapter.target_modules"
            )
    longest_first = sorted(pattern, key=len, reverse=True)
    return {
        name: next((pattern[suffix] for suffix in longest_first if ends_in(name, suffix)), default) for name in names
    }


def inject_lora(denoiser: Denoiser, config: LoraConfig, names: list[str]) -> Adapter:
    """Injects PEFT's layers in float32 and asserts that exactly `names` were touched."""
    # PEFT initialises from the global generator, and DoRA's magnitudes from the frozen weights
    with torch.random.fork_rng(devices=[]), denoiser.weights_at_rest():
        inject_adapter_in_model(config, denoiser.dit)
    layers = {name: module for name, module in denoiser.dit.named_modules() if isinstance(module, LoraLayer)}
    assert sorted(layers) == sorted(names), f"LoRA touched {len(layers)} modules instead of {len(names)}"
    for layer in layers.values():
        if type(layer) is PeftLinear:
            layer.__class__ = LoraLinear
    adapter = Adapter({name: layers[name] for name in names}, config)
    device = denoiser.dit.img_in.weight.device  # not that of the frozen weights, which may wait elsewhere
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(device, torch.float32)
        parameter.requires_grad_(True)
    return adapter
