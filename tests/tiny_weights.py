"""Tiny models of the kinds that metrics use, with random weights, in the layouts that the real ones have."""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import alexnet, squeezenet1_1, vgg16
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SIDE = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_clip(folder: Path) -> Path:
    """A CLIP of two towers with one layer each, whose tokenizer knows letters."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    layer = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**layer, **ends, "vocab_size": len(words), "max_position_embeddings": 77, "pad_token_id": 0},
        vision_config={**layer, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    CLIPProcessor(images, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
    return folder


def write_dino(folder: Path) -> Path:
    """A ViT of two layers."""
    torch.manual_seed(1)
    layer = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**layer, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def write_backbones(hub: Path) -> Path:
    """Random AlexNet, SqueezeNet and VGG16 in the layout of torch's hub folder; classifiers are zeros that take no room."""
    torch.manual_seed(2)
    (hub / "checkpoints").mkdir(parents=True)
    files = {"alexnet-owt-7be5be79": alexnet, "squeezenet1_1-b8a52dc0": squeezenet1_1, "vgg16-397923af": vgg16}
    for name, make in files.items():
        with torch.device("meta"):
            network = make(weights=None)
        state = {}
        for key, weight in network.state_dict().items():
            if key.startswith("features."):
                state[key] = 0.05 * torch.randn(weight.shape)
            else:
                state[key] = torch.zeros(1).expand(weight.shape)
        torch.save(state, hub / "checkpoints" / f"{name}.pth")
    return hub


class MeanColour(nn.Module):
    """The mean of each channel of 8-bit pixels (1, 3, H, W), in [0, 1]: three features."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255).mean((2, 3))


def write_features(file: Path, side: int = SIDE) -> Path:
    """`MeanColour` as a program of torch.export, for pictures of this side."""
    program = torch.export.export(MeanColour(), (torch.zeros(1, 3, side, side, dtype=torch.uint8),))
    torch.export.save(program, file)
    return file
