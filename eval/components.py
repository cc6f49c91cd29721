"""The parts of Qwen-Image-Edit, loaded when they are first needed, where and how a placement says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from data_prep.encoders import VAE, PromptEncoder, load_prompt_encoder, load_vae
from data_prep.model_dir import ModelDirectory
from eval.adapters import AdapterState, adapter_state, use_adapters
from eval.request import AdapterUse
from train.denoiser import Denoiser, load_denoiser

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model live, and in which numbers."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.bfloat16


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
        self._adapters: AdapterState = ()

    @contextmanager
    def encoders(self) -> Iterator[Encoders]:
        """The VAE and the text encoder."""
        yield Encoders(self._vae, self._prompt_encoder)

    @contextmanager
    def vae(self) -> Iterator[VAE]:
        """The VAE alone."""
        yield self._vae

    @contextmanager
    def denoiser(self, adapters: Sequence[AdapterUse] = ()) -> Iterator[Denoiser]:
        """The transformer with these adapters, added up, and no others; only what changes is read."""
        denoiser = self._denoiser
        state = adapter_state(adapters)
        if self._adapters != state:
            use_adapters(denoiser, adapters)
            self._adapters = state
        yield denoiser

    @cached_property
    def _vae(self) -> VAE:
        return load_vae(self.model, self.placement.device, self.placement.dtype)

    @cached_property
    def _prompt_encoder(self) -> PromptEncoder:
        return load_prompt_encoder(self.model, self.placement.device, self.placement.dtype)

    @cached_property
    def _denoiser(self) -> Denoiser:
        return load_denoiser(self.model, self.placement.device, self.placement.dtype)
