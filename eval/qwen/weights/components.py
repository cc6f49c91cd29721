"""The parts of Qwen-Image-Edit, loaded when they are first needed, where and how a placement says."""

import functools
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import psutil
import torch
from torch import nn

from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import VAE, PromptEncoder, load_prompt_encoder, load_vae
from eval.qwen.weights.adapters import added_up, put_beside, read_file, remove_adapters
from eval.qwen.weights.encoders import PlacedPromptEncoder, PlacedVAE
from eval.qwen.weights.extra_weights import ExtraParts, read_all
from eval.qwen.weights.fusing import FusedAdapters
from eval.qwen.weights.waiting import WaitingWeights
from eval.request.knobs import AdapterUse
from eval.request.metadata import AdapterState, adapter_state
from eval.request.placement import Placement
from eval.request.recent import Recent
from train.model.adapter_reader import LowRank
from train.model.denoiser import Denoiser, build_dit, load_denoiser, resolve_zero_cond_t
from train.model.execution import Execution
from train.model.offload import Layout, Offload

PartName = Literal["vae", "prompt_encoder", "denoiser"]
PARTS: tuple[PartName, ...] = get_args(PartName)
ADAPTER_BYTES = 4 * 2**30
"""Bytes of adapters that were read and are kept in CPU memory: two of rank 64 on all of Qwen-Image-Edit's modules."""


class Encoders(NamedTuple):
    """What turns images and instructions into the denoiser's numbers."""

    vae: VAE
    prompt_encoder: PromptEncoder


class Components:
    """The VAE, the text encoder and the denoiser with its adapters.

    Each is used inside its `with` block and nowhere else: outside, it may be on another device or freed.

    Attributes:
        moves: how often each part has come to its device, read or from where it waits.
    """

    def __init__(self, model: ModelDirectory, placement: Placement):
        self.model, self.placement = model, placement
        self.moves: Counter[PartName] = Counter()
        self._parts: dict[PartName, Any] = {}
        self._waiting: dict[PartName, WaitingWeights] = {}
        self._away: set[PartName] = set()
        self._in_use: Counter[PartName] = Counter()
        self._adapters: AdapterState | None = ()  # None where a switch has failed half-way
        self._fused: FusedAdapters | None = None  # while a denoiser of plain weights is there
        self._extra: ExtraParts | None = None  # while a denoiser is there
        self._say_once = functools.cache(functools.partial(print, file=sys.stderr))
        self._files: Recent[Mapping[str, LowRank]] = Recent(ADAPTER_BYTES, _num_bytes)

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
        assert self._extra
        parts, extras = added_up(denoiser.dit, adapters, self._read), read_all(adapters)
        self._extra.check(extras)  # what fails until here has touched nothing
        self._adapters = None
        self._extra.clear()  # first of all: what is fused lies over it
        if self._fused:
            self._fused.clear()
        else:
            remove_adapters(denoiser)
        self._extra.use(extras)
        if self._fused:
            self._fused.use(parts)
        else:
            put_beside(denoiser, parts)
        self._adapters = state

    def _read(self, use: AdapterUse, linear: Mapping[str, nn.Linear]) -> Mapping[str, LowRank]:
        (state,) = adapter_state([use])
        return self._files.get(state[:-1], lambda: read_file(use, linear))

    def _restore(self, names: Sequence[str]) -> None:
        """Gives linear modules of the denoiser their own weights back: from where they wait, or else from the model's files."""
        dit = self._parts["denoiser"].dit
        weights = {f"{name}.weight": dit.get_submodule(name).weight for name in names}
        if waiting := self._waiting.get("denoiser"):
            waiting.restore(list(weights.values()))
            return
        for name, tensor in self.model.tensors("transformer"):
            if name in weights:
                weights[name].data.copy_(tensor.to(self.placement.dtype))
        if self.placement.offload == "none" and self._home("denoiser").type == "cuda":
            self._keep_for_switches(dit)

    def _keep_for_switches(self, dit: nn.Module) -> None:
        """Keeps the base model's weights in CPU memory too: one adapter has taken another's place, and more may."""
        try:
            check_room(Layout(dit).num_bytes)
            self._waiting["denoiser"] = WaitingWeights(dit, self._home("denoiser"))
        except InputError as error:
            self._say_once(f"note: every change of adapters reads the transformer's files, since there is {error}")

    def _is_accelerated(self, name: PartName) -> bool:
        return self._home(name).type != "cpu"

    def free(self, *names: PartName) -> None:
        """Forgets the parts of these names, or all; they are read again when they are next needed."""
        for name in names or PARTS:
            assert not self._in_use[name], f"the {name} is in use"
            self._parts.pop(name, None)
            self._waiting.pop(name, None)
            self._away.discard(name)
            if name == "denoiser":
                self._adapters, self._fused, self._extra = (), None, None
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
        for name in self._parts.keys() - self._away:
            if self._in_use[name] or self._home(name) not in devices:
                continue
            if self._is_accelerated(name):
                self._set_aside(name)
            else:
                self.free(name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _set_aside(self, name: PartName) -> None:
        if name == "denoiser":
            if self._extra:
                self._extra.forget()
            if self._fused:
                self._fused.forget()
            else:
                remove_adapters(self._parts[name])
            self._adapters = ()
        self._waiting[name].leave()
        self._away.add(name)

    def _part(self, name: PartName) -> Any:
        if name not in self._parts:
            load = {"vae": self._load_vae, "prompt_encoder": self._load_prompt_encoder, "denoiser": self._load_denoiser}
            part = load[name]()
            if self.placement.offload == "model" and self._is_accelerated(name):
                self._waiting[name] = WaitingWeights(_module(part), self._home(name))
            self._parts[name] = part
            self.moves[name] += 1
        elif name in self._away:
            self._waiting[name].come()
            self._away.discard(name)
            self.moves[name] += 1
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
        denoiser = load_placed_denoiser(self.model, self.placement)
        if self.placement.weights == "full" and not self.placement.gguf:
            self._fused = FusedAdapters(denoiser, self._restore)
        self._extra = ExtraParts(denoiser)
        return denoiser


def load_placed_denoiser(model: ModelDirectory, placement: Placement) -> Denoiser:
    """The transformer in the numbers that a placement asks for, on its device; with `offload=layer` its blocks wait elsewhere.

    Raises:
        InputError: weights are missing or are not this transformer's, or there is no memory for them to wait in.
    """
    execution = Execution(compiled=placement.compile, say=_say)
    if not placement.gguf:
        waiting = model.config("transformer")["num_layers"] if placement.offload == "layer" else 0
        return load_denoiser(
            model,
            placement.device,
            placement.dtype,
            execution=execution,
            weights=placement.format,
            offload_blocks=waiting,
        )
    from eval.qwen.weights.gguf_weights import load_gguf  # an optional package

    with torch.device("meta"):
        dit = build_dit(model.config("transformer"))
    dit.requires_grad_(False).eval()
    blocks = dit.transformer_blocks
    offload = Offload(blocks, len(blocks), placement.device) if placement.offload == "layer" else None
    load_gguf(dit, placement.gguf, placement.device, placement.dtype, offload and offload.place)
    return Denoiser(dit, resolve_zero_cond_t(None, model), execution, offload).eval()


def check_room(num_bytes: int) -> None:
    """That CPU memory has room for so much in each process of this machine: pinned memory is never swapped, and asking for too
    much of it ends processes instead of failing.

    Raises:
        InputError: it has not.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = psutil.virtual_memory().available
    if num_bytes > available / processes:
        raise InputError(
            f"no CPU memory for {num_bytes / 2**30:.1f} GiB of waiting weights in each of {processes} process(es) "
            f"({available / 2**30:.1f} GiB are available): free some"
        )


def _say(text: str) -> None:
    """Of compilations; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def _module(part: Any) -> torch.nn.Module:
    """The module inside a part."""
    if isinstance(part, Denoiser):
        return part
    return part.module if isinstance(part, VAE) else part.model


def _num_bytes(adapter: Mapping[str, LowRank]) -> int:
    return sum(part.num_bytes for part in adapter.values())
