"""The parts of Qwen-Image-Edit, loaded when they are first needed, where and how a placement says."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import VAE, PromptEncoder, load_prompt_encoder, load_vae
from eval.qwen.weights.adapters import use_adapters
from eval.qwen.weights.encoders import PlacedPromptEncoder, PlacedVAE
from eval.request.metadata import AdapterState, adapter_state
from eval.request.placement import CPU, Placement
from eval.request.request import AdapterUse
from train.model.denoiser import Denoiser, build_dit, load_denoiser, resolve_zero_cond_t
from train.model.offload import Offload

PartName = Literal["vae", "prompt_encoder", "denoiser"]
PARTS: tuple[PartName, ...] = get_args(PartName)


class Encoders(NamedTuple):
    """What turns images and instructions into the denoiser's numbers."""

    vae: VAE
    prompt_encoder: PromptEncoder


class Components:
    """The VAE, the text encoder and the denoiser with its adapters.

    Each is used inside its `with` block and nowhere else: outside, it may be on another device or freed.
    """

    def __init__(self, model: ModelDirectory, placement: Placement):
        self.model, self.placement = model, placement
        self._parts: dict[PartName, Any] = {}
        self._in_use: Counter[PartName] = Counter()
        self._adapters: AdapterState | None = ()  # None where a switch has failed half-way

    @property
    def loaded(self) -> frozenset[PartName]:
        """The parts that are in memory."""
        return frozenset(self._parts)

    @contextmanager
    def encoders(self) -> Iterator[Encoders]:
        """The VAE and the text encoder."""
        with self._use("vae", "prompt_encoder") as (vae, prompt_encoder):
            yield Encoders(vae, prompt_encoder)

    @contextmanager
    def vae(self) -> Iterator[VAE]:
        """The VAE alone."""
        with self._use("vae") as (vae,):
            yield vae

    @contextmanager
    def denoiser(self, adapters: Sequence[AdapterUse] = ()) -> Iterator[Denoiser]:
        """The transformer with these adapters, added up, and no others; only what changes is read.

        Raises:
            InputError: an adapter is missing, or is not one for this model.
        """
        state = adapter_state(adapters)  # before anything is loaded
        with self._use("denoiser") as (denoiser,):
            if self._adapters != state:
                self._switch(denoiser, adapters, state)
            yield denoiser

    def _switch(self, denoiser: Denoiser, adapters: Sequence[AdapterUse], state: AdapterState) -> None:
        before, self._adapters = self._adapters, None
        try:
            use_adapters(denoiser, adapters)
        except InputError:
            self._adapters = before  # nothing has been touched
            raise
        self._adapters = state

    def free(self, *names: PartName) -> None:
        """Forgets the parts of these names, or all; they are read again when they are next needed."""
        for name in names or PARTS:
            assert not self._in_use[name], f"the {name} is in use"
            self._parts.pop(name, None)
            if name == "denoiser":
                self._adapters = ()
        gc.collect()  # modules refer to each other in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _use(self, *names: PartName) -> Iterator[list[Any]]:
        self._in_use.update(names)
        try:
            if self.placement.offload == "model":
                self._make_room({self._home(name) for name in names})
            yield [self._part(name) for name in names]
        finally:
            self._in_use.subtract(names)

    def _make_room(self, devices: set[torch.device]) -> None:
        """Sets aside what is on these devices and not in use."""
        for name in PARTS:
            if name not in self._parts or self._in_use[name] or self._home(name) not in devices:
                continue
            if self._home(name).type == "cpu":
                self.free(name)
            else:
                _module(self._parts[name]).to(CPU)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _part(self, name: PartName) -> Any:
        if name not in self._parts:
            load = {"vae": self._load_vae, "prompt_encoder": self._load_prompt_encoder, "denoiser": self._load_denoiser}
            self._parts[name] = load[name]()
        elif self.placement.offload == "model":
            _module(self._parts[name]).to(self._home(name))
        return self._parts[name]

    def _home(self, name: PartName) -> torch.device:
        return self.placement.device if name == "denoiser" else self.placement.home_of_encoders

    def _load_vae(self) -> VAE:
        vae = load_vae(self.model, self.placement.home_of_encoders, self.placement.dtype)
        return PlacedVAE(vae, self.placement.device, self.placement.vae_tiling)

    def _load_prompt_encoder(self) -> PromptEncoder:
        encoder = load_prompt_encoder(self.model, self.placement.home_of_encoders, self.placement.dtype)
        return PlacedPromptEncoder(encoder, self.placement.device)

    def _load_denoiser(self) -> Denoiser:
        return load_placed_denoiser(self.model, self.placement)


def load_placed_denoiser(model: ModelDirectory, placement: Placement) -> Denoiser:
    """The transformer in the numbers that a placement asks for, on its device; with `offload=layer` its blocks wait elsewhere.

    Raises:
        InputError: weights are missing or are not this transformer's, or there is no memory for them to wait in.
    """
    if not placement.gguf:
        waiting = model.config("transformer")["num_layers"] if placement.offload == "layer" else 0
        return load_denoiser(model, placement.device, placement.dtype, weights=placement.format, offload_blocks=waiting)
    from eval.qwen.weights.gguf_weights import load_gguf  # an optional package

    with torch.device("meta"):
        dit = build_dit(model.config("transformer"))
    dit.requires_grad_(False).eval()
    blocks = dit.transformer_blocks
    offload = Offload(blocks, len(blocks), placement.device) if placement.offload == "layer" else None
    load_gguf(dit, placement.gguf, placement.device, placement.dtype, offload and offload.place)
    return Denoiser(dit, resolve_zero_cond_t(None, model), offload=offload).eval()


def _module(part: Any) -> torch.nn.Module:
    """The module inside a part."""
    if isinstance(part, Denoiser):
        return part
    return part.module if isinstance(part, VAE) else part.model
