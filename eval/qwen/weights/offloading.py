"""Layers that wait in CPU memory and come to the device when they compute, by diffusers' group offloading."""

from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer

from train.model.denoiser import Denoiser


def stream_layers(denoiser: Denoiser, device: torch.device, folder: Path | None = None) -> None:
    """From now on each layer of the transformer, which is on the CPU, comes to `device` when it computes, and leaves after.

    On cuda the next layer comes while one computes, from pinned memory. The hooks sit on the leaves, because the denoiser
    calls a block's layers and never the block, and on the denoiser, whose first call shows their order.

    Args:
        folder: let the layers wait in files there instead of in memory.
    """
    from diffusers.hooks.group_offloading import apply_group_offloading  # nobody else waits for it

    cuda = device.type == "cuda"
    apply_group_offloading(
        denoiser,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=cuda,
        record_stream=cuda,
        offload_to_disk_path=None if folder is None else str(folder),
    )


def keep_adapters_on(denoiser: Denoiser, device: torch.device) -> None:
    """Brings the LoRA layers, which PEFT put beside the waiting base layers, to `device` for good: they are small."""
    for layer in denoiser.dit.modules():
        if isinstance(layer, LoraLayer):
            for weights in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                weights.to(device)
