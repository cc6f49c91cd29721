"""Any number of adapters added up, and put beside a denoiser's weights and taken off without touching them.

Beside the weights stand adapters of quantised ones; `fusing.py` puts those of plain weights inside.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from data_prep.errors import InputError
from eval.request.knobs import AdapterUse
from train.model.adapter import inject
from train.model.adapter_files import adapter_file
from train.model.adapter_reader import LowRank, linear_modules, low_rank_sum, read_adapter
from train.model.denoiser import Denoiser
from train.model.layers.lokr import KroneckerBeside

Read = Callable[[AdapterUse, Mapping[str, nn.Linear]], Mapping[str, LowRank]]
"""Reads an adapter for linear modules by their names."""


def read_file(use: AdapterUse, linear: Mapping[str, nn.Linear]) -> dict[str, LowRank]:
    """From its file."""
    return read_adapter(use.path, linear)


def added_up(dit: nn.Module, adapters: Sequence[AdapterUse], read: Read = read_file) -> dict[str, LowRank]:
    """What adapters change, added up with their weights, by the module's name. An adapter of weight 0 is none.

    Raises:
        InputError: a file is missing or no adapter of this transformer, or a DoRA adapter is among several or for weights
            that are quantised.
    """
    linear = linear_modules(dit)
    found = [(use, read(use, linear)) for use in adapters if use.weight != 0]
    _check_dora(found, linear)
    return {
        name: low_rank_sum([(adapter[name], use.weight) for use, adapter in found if name in adapter])
        for name in linear
        if any(name in adapter for _, adapter in found)
    }


@torch.no_grad()
def put_beside(denoiser: Denoiser, parts: Mapping[str, LowRank]) -> None:
    """Replaces whatever stands beside the denoiser's weights by these, with products in the denoiser's dtype.

    Args:
        parts: by the module's name; without DoRA, which changes what is there.
    """
    assert all(part.magnitude is None for part in parts.values()), "DoRA is fused"
    remove_adapters(denoiser)
    if low_rank := {name: part for name, part in parts.items() if part.rank}:
        _attach(denoiser, low_rank)
    weight = denoiser.dit.img_in.weight
    for name, product in [(name, product) for name, part in parts.items() for product in part.products]:
        layer = KroneckerBeside(denoiser.dit.get_submodule(name), product.to(weight.device, weight.dtype))
        denoiser.dit.set_submodule(name, layer)


def remove_adapters(denoiser: Denoiser) -> None:
    """Puts the base layers back where LoRA and LoKr layers stand, one on another."""
    dit, kinds = denoiser.dit, (LoraLayer, KroneckerBeside)
    for name, layer in [(name, module) for name, module in dit.named_modules() if isinstance(module, kinds)]:
        if not name.endswith(".base_layer"):
            while isinstance(layer, kinds):
                layer = layer.base_layer
            dit.set_submodule(name, layer)
    if hasattr(dit, "peft_config"):  # PEFT's note of what it injected
        del dit.peft_config


def _check_dora(found: Sequence[tuple[AdapterUse, Mapping[str, LowRank]]], linear: Mapping[str, nn.Linear]) -> None:
    for use, adapter in found:
        with_magnitude = [part.magnitude is not None for part in adapter.values()]
        if any(with_magnitude) and not all(with_magnitude):
            raise InputError(f"{adapter_file(use.path)} mixes DoRA and plain LoRA modules, which cannot be loaded")
        if any(with_magnitude) and len(found) > 1:
            raise InputError(
                f"{adapter_file(use.path)} is a DoRA adapter, which rescales the weights and cannot be added to others: "
                "use it alone"
            )
        if any(with_magnitude) and any(type(linear[name]) is not nn.Linear for name in adapter):
            raise InputError(
                f"{adapter_file(use.path)} is a DoRA adapter, which needs the lengths of the full weights: "
                "use it with weights=full and without gguf"
            )


def _attach(denoiser: Denoiser, parts: Mapping[str, LowRank]) -> None:
    """Injects one LoRA of which each module has its own rank."""
    ranks = {name: part.rank for name, part in parts.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=list(parts), rank_pattern=others, alpha_pattern=others
    )
    adapter = inject(denoiser, config, list(parts))
    adapter.load_state_dict(
        {f"{name}.lora_A.weight": part.down for name, part in parts.items()}
        | {f"{name}.lora_B.weight": part.up for name, part in parts.items()}
    )
    adapter.copy_for_products(denoiser.dit.transformer_blocks, denoiser.dit.img_in.weight.dtype)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    for copy, weight in zip(*adapter.copies, strict=True):  # nothing is trained: what is multiplied is enough
        weight.data = copy
