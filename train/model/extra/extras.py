"""All that an adapter trains beside LoRA, as one thing: made, named in files, written and read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.errors import InputError
from train.model.adapter_files import EXTRA_FILE, EXTRA_KEY, WEIGHTS_FILE, adapter_file, extra_file, read_header
from train.model.denoiser import Denoiser
from train.model.extra.modules import ExtraModule, build_module
from train.model.extra.whole import keep_in_float32, trained_modules, trained_parameters

ADDED = "modules."
"""How names of an added module's parameters begin; the transformer has no module of this name."""
TOGETHER = ("config_hash", "step")
"""Keys that both headers have, and that must be equal."""
Nodes = Mapping[str, Mapping[str, Any]]
"""Name of an added module -> its `_target_` and arguments."""


@dataclass
class Extras:
    """What is trained beside LoRA in a denoiser.

    Attributes:
        parameters: float32, by name: `proj_out.weight` of the transformer, `modules.ste.leave.weight` of an added module.
        in_full: the transformer's modules that are trained in full.
        nodes: the added modules.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    in_full: list[str] = field(default_factory=list)
    nodes: Nodes = field(default_factory=dict)

    def header(self) -> dict[str, str]:
        """What the adapter's header says of it; nothing where there is nothing."""
        if not self.parameters:
            return {}
        return {EXTRA_KEY: json.dumps({"file": EXTRA_FILE, "in_full": self.in_full, "added": self.nodes})}

    def export(
        self, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype
    ) -> None:
        """Writes `extra_modules.safetensors` into the folder, if there is something to write.

        Args:
            tensors: the weights that are to be in it, by the names of `parameters`.
            metadata: metadata of the adapter.
            dtype: data type of the file.
        """
        if not self.parameters:
            return
        stored = {name: tensors[name].to("cpu", dtype).contiguous() for name in self.parameters}
        own = {"format": "pt", **metadata, "adapter": WEIGHTS_FILE, "added": json.dumps(self.nodes)}
        save_file(stored, folder / EXTRA_FILE, metadata=own)

    @torch.no_grad()
    def start_from(self, weights: "ExtraWeights") -> None:
        """Makes these what another adapter's are; what that one lacks stays as it is.

        Raises:
            InputError: the other has a tensor that is not trained here, or of another shape.
        """
        for name, tensor in weights.tensors.items():
            mine = self.parameters.get(name)
            if mine is None or mine.shape != tensor.shape:
                key = "adapter.modules" if name.startswith(ADDED) else "adapter.train_modules"
                raise InputError(
                    f"{weights.file} has {name} of shape {tuple(tensor.shape)}, which {key} leaves out or gives another shape: "
                    "set it as in that adapter's training"
                )
            mine.copy_(tensor)


@dataclass(frozen=True)
class ExtraWeights:
    """What stands in a file `extra_modules.safetensors`."""

    file: Path
    tensors: dict[str, Tensor]
    """By the names of `Extras.parameters`, float32."""
    nodes: Nodes

    @property
    def in_full(self) -> dict[str, Tensor]:
        """The transformer's weights that are trained in full."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(ADDED)}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def build(self, token_width: int) -> dict[str, ExtraModule]:
        """The added modules, by name, on the CPU in float32.

        Raises:
            InputError: a class cannot be imported, or it has other weights than the file.
        """
        built = {}
        for name, node in self.nodes.items():
            module = build_module(f"{self.file}: the module {name}", node, token_width)
            start = f"{ADDED}{name}."
            own = {key.removeprefix(start): each for key, each in self.tensors.items() if key.startswith(start)}
            wanted = {key: tuple(each.shape) for key, each in module.state_dict().items()}
            if wanted != {key: tuple(each.shape) for key, each in own.items()}:
                raise InputError(
                    f"{self.file}: the module {name} has different weights from its class {node['_target_']} here: use the "
                    "version that it was trained with, and the same base model"
                )
            module.load_state_dict(own)
            built[name] = module.requires_grad_(False).eval()
        return built


def attach_extras(denoiser: Denoiser, train_modules: Sequence[str], modules: Nodes, seed: int = 0) -> Extras:
    """Makes modules of the transformer trainable in full, and adds others; nothing changes yet.

    Args:
        denoiser: loaded with the same `train_modules`, and with LoRA attached to what is not among them.
        seed: random seed of added modules' first weights.

    Raises:
        InputError: a name matches nothing, or an added module cannot be built or named so.
    """
    if not (train_modules or modules):
        return Extras()
    dit, dtype, device = denoiser.dit, denoiser.dit.img_in.weight.dtype, denoiser.dit.img_in.weight.device
    names = trained_parameters(dit, train_modules)
    keep_in_float32(dit, names, dtype, device)
    parameters: dict[str, nn.Parameter] = {name: dict_parameter(dit, name) for name in names}
    for name, node in modules.items():
        if hasattr(nn.ModuleDict(), name):
            raise InputError(f"adapter.modules: the name {name} is taken by torch.nn.ModuleDict: choose another")
        module = build_module(f"adapter.modules.{name}", node, dit.img_in.out_features, seed)
        own = [each for each, _ in module.named_parameters()]
        keep_in_float32(module, own, dtype, device)
        denoiser.extra[name] = module.to(device)
        parameters |= {f"{ADDED}{name}.{each}": dict_parameter(module, each) for each in own}
    return Extras(parameters, trained_modules(dit, train_modules), modules)


def dict_parameter(root: nn.Module, name: str) -> nn.Parameter:
    """A parameter itself, not what is read of it."""
    owner, _, leaf = name.rpartition(".")
    parameter = root.get_submodule(owner)._parameters[leaf]
    assert parameter is not None
    return parameter


def read_extras(adapter: Path) -> ExtraWeights | None:
    """What was trained beside LoRA; None where there was nothing.

    Args:
        adapter: a checkpoint folder or a safetensors file.

    Raises:
        InputError: the file is missing, not readable, or of another adapter.
    """
    if (file := extra_file(adapter)) is None:
        return None
    first = read_header(adapter_file(adapter))
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error
    header = read_header(file)
    if any(header.get(key) != first.get(key) for key in TOGETHER) or "added" not in header:
        raise InputError(f"{file} was not saved together with {adapter_file(adapter)}: take both from one checkpoint")
    return ExtraWeights(file, tensors, json.loads(header["added"]))
