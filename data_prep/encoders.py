"""The two frozen encoders: the VAE (DiffSynth's) and Qwen2.5-VL with the edit template (transformers')."""

from collections.abc import Sequence
from typing import Any

import torch
from diffsynth.models.qwen_image_vae import QwenImageCausalConv3d, QwenImageVAE
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLModel, Qwen2VLProcessor
from transformers.utils import logging as transformers_logging

from data_prep.errors import InputError
from data_prep.model_dir import ModelDirectory

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
TEMPLATE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
DROPPED_TOKENS = 64  # the template up to the user's turn
MAX_IMAGES = 3


class SingleFrameConv(nn.Module):
    """A causal 3-D convolution on one frame: only its last temporal slice meets data, so a 2-D convolution is equal."""

    def __init__(self, conv: QwenImageCausalConv3d):
        super().__init__()
        self.padding = int(conv._padding[2]), int(conv._padding[0])
        self.stride = conv.stride[1:]
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].clone(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False) if conv.bias is not None else None

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """(B, C, 1, H, W) -> (B, C', 1, H', W')."""
        return functional.conv2d(x[:, :, 0], self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


def use_single_frame(module: nn.Module) -> None:
    """Replaces every causal 3-D convolution inside `module` by its equal for single frames, a third of the weights."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, SingleFrameConv(child))
        else:
            use_single_frame(child)


class VAE:
    """Images to normalised latents and back. Gradients flow through both."""

    def __init__(self, module: QwenImageVAE):
        self.module = module

    @property
    def _weight(self) -> Tensor:
        return next(self.module.parameters())

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> latents (B, 16, H/8, W/8), float32, the mean of the
        posterior, normalised by the model's per-channel mean and standard deviation."""
        return self.module.encode(pixels.to(self._weight)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) -> pixels (B, 3, 8h, 8w), float32, about [-1, 1]."""
        return self.module.decode(latents.to(self._weight)).float()


def build_vae(config: dict) -> QwenImageVAE:
    """DiffSynth's VAE at the sizes, and with the latent statistics, of `vae/config.json`."""
    names = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
    vae = QwenImageVAE(**{name: config[name] for name in names if name in config})
    with torch.device("cpu"):
        vae.mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1, 1)
        vae.std = 1 / torch.tensor(config["latents_std"]).view(1, -1, 1, 1, 1)
    return vae


def load_vae(directory: ModelDirectory, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> VAE:
    """Reads `vae/`, frozen and in evaluation mode.

    Raises:
        InputError: weights are missing, unexpected or of another shape than the configuration's.
    """
    with torch.device("meta"):
        module = build_vae(directory.config("vae"))
    directory.load_into(module, "vae", device, dtype)
    use_single_frame(module)
    return VAE(module.requires_grad_(False).eval())


class PromptEncoder:
    """Hidden states of an instruction and the images that it speaks of.

    Args:
        model: transformers' Qwen2_5_VLModel.
        processor: transformers' Qwen2VLProcessor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor

    @torch.no_grad()
    def encode(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """The last hidden states after the template's 64 tokens, (L, D), in the model's dtype.

        Args:
            images: one to three, already at their vision size.

        Raises:
            ValueError: no image, or more than three.
        """
        if not 1 <= len(images) <= MAX_IMAGES:
            raise ValueError(f"an instruction needs 1 to {MAX_IMAGES} images, got {len(images)}")
        inputs = self.processor(text=[edit_text(prompt, len(images))], images=list(images), return_tensors="pt")
        # mm_token_type_ids is among the inputs: without it image tokens silently get 1-D positions instead of M-RoPE.
        output = self.model(**inputs.to(self.model.device), use_cache=False)
        return output.last_hidden_state[0, DROPPED_TOKENS:]


def edit_text(prompt: str, num_images: int) -> str:
    """The edit template in its multi-image form, which 2509 and 2511 use for a single image too."""
    return TEMPLATE.format("".join(PICTURE.format(i + 1) for i in range(num_images)) + prompt)


def load_prompt_encoder(
    directory: ModelDirectory, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> PromptEncoder:
    """Reads `text_encoder/` and `processor/`, frozen and in evaluation mode, without the language head.

    Raises:
        InputError: weights are missing or of another shape than the configuration's.
    """
    folder = directory.path / "text_encoder"
    directory.shards("text_encoder")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports the language head that we leave out
    try:
        loaded: Any = Qwen2_5_VLModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        model, report = loaded
    finally:
        transformers_logging.set_verbosity(verbosity)
    wrong = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise InputError(f"{folder} lacks or mismatches {len(wrong)} tensors, the first is {wrong[0]}")
    processor = Qwen2VLProcessor.from_pretrained(directory.path / "processor")
    return PromptEncoder(model.to(device).requires_grad_(False).eval(), processor)
