"""Which adapters a denoiser has: any number of LoRAs, added up, put on and taken off without touching the base weights."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from data_prep.errors import InputError
from eval.request.request import AdapterUse
from train.model.adapter import inject_lora
from train.model.adapter_files import adapter_file
from train.model.adapter_reader import LowRank, linear_modules, low_rank_sum, read_adapter
from train.model.denoiser import Denoiser


@torch.no_grad()
def use_adapters(denoiser: Denoiser, adapters: Sequence[AdapterUse]) -> None:
    """Replaces whatever adapters the denoiser has by these, added up with their weights. An adapter of weight 0 is none.

    Raises:
        InputError: a file is missing or no adapter of this transformer, or a DoRA adapter is among several. The denoiser is
            as before then.
    """
    used = [use for use in adapters if use.weight != 0]
    linear = linear_modules(denoiser.dit)
    read = [(use, read_adapter(use.path, linear)) for use in used]
    _check_dora(read, linear)
    combined = {
        name: low_rank_sum([(adapter[name], use.weight) for use, adapter in read if name in adapter])
        for name in linear
        if any(name in adapter for _, adapter in read)
    }
    remove_adapters(denoiser)
    if combined:
        _attach(denoiser, combined, dora_weight=used[0].weight)


def remove_adapters(denoiser: Denoiser) -> None:
    """Puts the base layers back where LoRA layers stand."""
    dit = denoiser.dit
    for name, layer in [(name, module) for name, module in dit.named_modules() if isinstance(module, LoraLayer)]:
        dit.set_submodule(name, layer.get_base_layer())
    if hasattr(dit, "peft_config"):  # PEFT's note of what it injected
        del dit.peft_config


def _check_dora(read: list[tuple[AdapterUse, dict[str, LowRank]]], linear: dict[str, nn.Linear]) -> None:
    for use, adapter in read:
        with_magnitude = [part.magnitude is not None for part in adapter.values()]
        if any(with_magnitude) and not all(with_magnitude):
            raise InputError(f"{adapter_file(use.path)} mixes DoRA and plain LoRA modules, which cannot be loaded")
        if any(with_magnitude) and len(read) > 1:
            raise InputError(
                f"{adapter_file(use.path)} is a DoRA adapter, which rescales the weights and cannot be added to others: "
                "use it alone"
            )
        if any(with_magnitude) and any(type(linear[name]) is not nn.Linear for name in adapter):
            raise InputError(
                f"{adapter_file(use.path)} is a DoRA adapter, which needs the lengths of the full weights: "
                "use it with weights=full and without gguf"
            )


def _attach(denoiser: Denoiser, parts: dict[str, LowRank], dora_weight: float) -> None:
    """Injects one LoRA of which each module has its own rank."""
    ranks = {name: part.rank for name, part in parts.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    dora = all(part.magnitude is not None for part in parts.values())
    config = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=list(parts), rank_pattern=others, alpha_pattern=others, use_dora=dora
    )
    adapter = inject_lora(denoiser, config, list(parts))
    adapter.load_state_dict(_state(parts))
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    if dora and dora_weight != 1:
        for layer in adapter.layers.values():  # what this part returns is what DoRA adds to the base layer's output
            layer.lora_magnitude_vector["default"].register_forward_hook(_times(dora_weight))


def _times(weight: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook."""
    return lambda module, args, output: weight * output


def _state(parts: dict[str, LowRank]) -> dict[str, Tensor]:
    """The names of `Adapter.state_dict`."""
    state = {}
    for name, part in parts.items():
        state |= {f"{name}.lora_A.weight": part.down, f"{name}.lora_B.weight": part.up}
        if part.magnitude is not None:
            state[f"{name}.lora_magnitude_vector.weight"] = part.magnitude.flatten()
    return state
