"""What adapters have beside LoRA, put into a denoiser and taken out again: weights trained in full, and added modules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from eval.request.knobs import AdapterUse
from losses.batch import Scene
from train.model.denoiser import Denoiser
from train.model.extra import ExtraModule
from train.model.extra.extras import ExtraWeights, read_extras
from train.model.quantize import QuantizedLinear, round_weight, widened

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_all(adapters: Sequence[AdapterUse]) -> list[tuple[ExtraWeights, float]]:
    """The weights beside LoRA of each adapter that has some, with the adapter's weight. An adapter of weight 0 has none.

    Raises:
        InputError: a file is missing, or is no such file.
    """
    found = [(read_extras(use.path), use.weight) for use in adapters if use.weight != 0]
    return [(extra, weight) for extra, weight in found if extra]


class ExtraParts:
    """What is in a denoiser beside LoRA. Weights that were changed are kept as they were, in CPU memory.

    Args:
        denoiser: as it was loaded, without adapters.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self._modules = dict(denoiser.dit.named_modules())
        self._before: list[tuple[Tensor, Tensor]] = []

    def check(self, extras: Sequence[tuple[ExtraWeights, float]]) -> None:
        """What would fail of `use`, before anything is touched.

        Raises:
            InputError: a weight is of another model, or stands in a format that cannot take it.
        """
        for extra, _ in extras:
            for name, tensor in extra.in_full.items():
                owner, _, leaf = name.rpartition(".")
                module: Any = self._modules.get(owner)
                mine = module._parameters.get(leaf) if module is not None else None
                if mine is not None and mine.dtype not in PLAIN_DTYPES and not isinstance(module, QuantizedLinear):
                    raise InputError(
                        f"{extra.file} replaces {name}, which the GGUF file keeps in a format of its own: edit without --gguf"
                    )
                shape = None if mine is None else tuple(mine.shape)
                if isinstance(module, QuantizedLinear) and leaf == "weight":
                    shape = (module.out_features, module.in_features)
                if shape != tuple(tensor.shape):
                    raise InputError(
                        f"{extra.file} is for another model: it has {name} of shape {tuple(tensor.shape)}, the model "
                        f"{shape or 'none'}"
                    )

    @torch.no_grad()
    def use(self, extras: Sequence[tuple[ExtraWeights, float]]) -> None:
        """From now on the denoiser computes with these. Before, `clear` has taken away what was there, and LoRA too."""
        assert not self._before
        assert not self.denoiser.extra
        if not extras:
            return
        dit = self.denoiser.dit
        device, dtype = dit.img_in.weight.device, dit.img_in.weight.dtype
        wanted: dict[str, list[tuple[Tensor, float]]] = {}
        for number, (extra, weight) in enumerate(extras):
            for name, tensor in extra.in_full.items():
                wanted.setdefault(name, []).append((tensor, weight))
            for name, module in extra.build(dit.img_in.out_features).items():
                shared = module if weight == 1 else Share(module, weight)
                self.denoiser.extra[f"{number}_{name}"] = shared.to(device, dtype)
        with self._at_rest():
            for name, tensors in wanted.items():
                owner, _, leaf = name.rpartition(".")
                self._set(self._modules[owner], leaf, tensors)

    @torch.no_grad()
    def clear(self) -> None:
        """The denoiser is as it was loaded, but for LoRA."""
        self.denoiser.extra.clear()
        if self._before:
            with self._at_rest():
                for tensor, before in self._before:
                    tensor.data.copy_(before)
        self._before = []

    def forget(self) -> None:
        """The weights are the base model's again, by another's doing."""
        self.denoiser.extra.clear()
        self._before = []

    def _at_rest(self) -> Any:
        """Blocks that wait in CPU memory are changed there, when no copy is on its way, and come anew."""
        if offload := self.denoiser.offload:
            offload.streams.copying.synchronize()
            offload.change_on_arrival(None)
        return self.denoiser.weights_at_rest()

    def _set(self, module: Any, leaf: str, tensors: Sequence[tuple[Tensor, float]]) -> None:
        """Gives a parameter the weighted sum of changes, rounded once."""
        parameter, in_bits = module._parameters[leaf], isinstance(module, QuantizedLinear) and leaf == "weight"
        base = widened(parameter.data, module.scale, module.dtype) if in_bits else parameter.data
        changed = weighted([(tensor.to(base.device), weight) for tensor, weight in tensors], base.float()).to(
            base.dtype
        )
        values = round_weight(changed, parameter.dtype) if in_bits else (changed,)
        for tensor, value in zip((parameter, module.scale) if in_bits else (parameter,), values, strict=True):
            self._before.append((tensor, tensor.data.to("cpu", copy=True)))
            tensor.data.copy_(value)


def weighted(tensors: Sequence[tuple[Tensor, float]], base: Tensor) -> Tensor:
    """base + sum of weight · (tensor − base); of one alone with weight 1 that tensor, bit for bit."""
    if len(tensors) == 1:
        return torch.lerp(base, *tensors[0])
    return base + torch.stack([weight * (tensor - base) for tensor, weight in tensors]).sum(0)


class Share(nn.Module):
    """A module of which some counts: tokens + weight · (module(tokens) − tokens)."""

    def __init__(self, module: ExtraModule, weight: float):
        super().__init__()
        self.module, self.weight = module, weight

    def forward(self, tokens: Tensor, sigma: Tensor, scene: Scene) -> Tensor:
        """As `ExtraModule.forward`."""
        return torch.lerp(tokens, self.module(tokens, sigma, scene), self.weight)
