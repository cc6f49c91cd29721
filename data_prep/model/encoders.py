"""The two frozen encoders: the VAE (DiffSynth's) and Qwen2.5-VL with the edit template (transformers')."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffsynth.models.qwen_image_vae import QwenImageCausalConv3d, QwenImageVAE
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLProcessor

from data_prep.errors import BadPrompt, InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.editions import PLUS, Edition
from data_prep.rows.rows import MAX_SOURCES

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
TEMPLATE = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE_SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects "
    "and background:"
)
"""The template for text to image, as Qwen-Image was trained (diffusers' QwenImagePipeline)."""
DROPPED_TOKENS, DROPPED_IMAGE_TOKENS = 64, 34  # the template up to the user's turn: of an edit, of text to image
MAX_PROMPT_TOKENS = 4096
"""Most tokens of an instruction: the positions that the transformer has for text and images."""
LATENT_CHANNELS = 16


class SingleFrameConv(nn.Module):
    """A causal 3-D convolution on one frame: only its last temporal slice meets data, so a 2-D convolution is equal."""

    def __init__(self, conv: QwenImageCausalConv3d):
        super().__init__()
        self.padding = int(conv._padding[2]), int(conv._padding[0])
        self.stride = conv.stride[1:]
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].clone())
        self.bias = nn.Parameter(conv.bias.detach().clone()) if conv.bias is not None else None

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """(B, C, 1, H, W) -> (B, C', 1, H', W')."""
        return functional.conv2d(x[:, :, 0], self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


def use_single_frame(module: nn.Module) -> None:
    """Replaces every causal 3-D convolution inside `module` by its equal for single frames, a third of the weights.

    Names stay as they are; `video_weights` is the way back.
    """
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, SingleFrameConv(child))
        else:
            use_single_frame(child)


def video_weights(weights: Mapping[str, Tensor], layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published layout of weights that `use_single_frame` made 2-D: the last temporal slice, and zeros before it.

    Args:
        weights: state dict of a VAE after `use_single_frame`.
        layout: state dict of the same VAE before, which may be on the meta device.
    """
    restored = {}
    for name, weight in weights.items():
        restored[name] = weight.new_zeros(layout[name].shape)
        live = restored[name] if weight.ndim == layout[name].ndim else restored[name][:, :, -1]
        live.copy_(weight)
    return restored


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
    """DiffSynth's VAE at the sizes, and with the latent statistics, of `vae/config.json`.

    Raises:
        InputError: other than 16 latent channels, which upstream's code is written for.
    """
    counts = [config.get("z_dim"), *(len(config.get(name, ())) for name in ("latents_mean", "latents_std"))]
    if counts != [LATENT_CHANNELS] * 3:
        raise InputError(
            f"vae/config.json: z_dim, latents_mean and latents_std describe {counts} channels; "
            f"Qwen-Image's VAE has {LATENT_CHANNELS}"
        )
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
        edition: of Qwen-Image-Edit, which decides on the template.
    """

    def __init__(self, model: Any, processor: Any, edition: Edition = PLUS):
        self.model = model
        self.processor = processor
        self.edition = edition

    @torch.no_grad()
    def encode(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """The last hidden states after the template's 64 tokens, (L, D), in the model's dtype; after the 34 of text to image
        without images.

        Args:
            images: up to three, already at their vision size.

        Raises:
            ValueError: more than three images.
            BadPrompt: the instruction is too long, or holds a token of the template, which is no text to the model.
        """
        return self._forward([self._inputs(prompt, images)], dropped_tokens(images))[0]

    def encode_many(
        self, requests: Sequence[tuple[str, Sequence[Image.Image]]], batch_size: int
    ) -> list[Tensor | BadPrompt]:
        """`encode` of several instructions with their images: the hidden states of each, or why it cannot be encoded.

        On a GPU those of one length are computed together, at most `batch_size` at a time. On a CPU each is computed by
        itself, as that is no slower there, and its last bits do not depend on the others.
        """
        if self.model.device.type == "cpu":
            return [self._encode_or_refuse(prompt, images) for prompt, images in requests]
        return self.encode_batches(requests, batch_size)

    @torch.no_grad()
    def encode_batches(
        self, requests: Sequence[tuple[str, Sequence[Image.Image]]], batch_size: int
    ) -> list[Tensor | BadPrompt]:
        """`encode_many` as on a GPU, wherever the model is."""
        found: dict[int, Tensor | BadPrompt] = {}
        alike: dict[tuple[int, int], dict[int, Any]] = {}  # by length, and what is dropped of it
        for place, (prompt, images) in enumerate(requests):
            try:
                inputs = self._inputs(prompt, images)
            except BadPrompt as error:
                found[place] = error
            else:
                alike.setdefault((inputs["input_ids"].shape[1], dropped_tokens(images)), {})[place] = inputs
        for (_, dropped), group in alike.items():
            places = list(group)
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                found.update(zip(batch, self._forward([group[place] for place in batch], dropped), strict=True))
        return [found[place] for place in range(len(requests))]

    def _encode_or_refuse(self, prompt: str, images: Sequence[Image.Image]) -> Tensor | BadPrompt:
        try:
            return self.encode(prompt, images)
        except BadPrompt as error:
            return error

    def _inputs(self, prompt: str, images: Sequence[Image.Image]) -> Any:
        """What the model takes, of a batch of one."""
        self._check_prompt(prompt)
        if len(images) > MAX_SOURCES:
            raise ValueError(f"an instruction takes up to {MAX_SOURCES} images, got {len(images)}")
        if len(images) > self.edition.max_images:
            raise BadPrompt(
                f"the first Qwen-Image-Edit ({self.edition.pipeline}) edits one image, got {len(images)}: take "
                "Qwen-Image-Edit-2509 or 2511 for more"
            )
        text = edit_text(prompt, len(images), self.edition) if images else TEMPLATE.format(IMAGE_SYSTEM, prompt)
        return self.processor(text=[text], images=list(images) or None, return_tensors="pt")

    def _forward(self, inputs: Sequence[Any], dropped: int) -> Tensor:
        """Hidden states (B, L, D) of inputs of one length, without the first `dropped`."""
        together = {name: torch.cat([each[name] for each in inputs]).to(self.model.device) for name in inputs[0]}
        # mm_token_type_ids is among the inputs: without it image tokens silently get 1-D positions instead of M-RoPE.
        return self.model(**together, use_cache=False).last_hidden_state[:, dropped:]

    def _check_prompt(self, prompt: str) -> None:
        tokenizer = self.processor.tokenizer
        reserved = [token for token in tokenizer.added_tokens_encoder if token.startswith("<|") and token in prompt]
        if reserved:
            raise BadPrompt(f"the instruction holds {reserved[0]}, which the model reserves for itself: remove it")
        length = len(tokenizer(prompt, verbose=False).input_ids)
        if length > MAX_PROMPT_TOKENS:
            raise BadPrompt(
                f"the instruction has {length} tokens, the model takes at most {MAX_PROMPT_TOKENS}: shorten it"
            )


def dropped_tokens(images: Sequence[Image.Image]) -> int:
    """Number of the template's tokens that are dropped, before the user's turn."""
    return DROPPED_TOKENS if images else DROPPED_IMAGE_TOKENS


def edit_text(prompt: str, num_images: int, edition: Edition = PLUS) -> str:
    """The edit template. That of 2509 and 2511 numbers its images, a single one too."""
    return TEMPLATE.format(SYSTEM, "".join(edition.picture.format(i + 1) for i in range(num_images)) + prompt)


def text_encoder_name(stored: str) -> str | None:
    """Qwen2_5_VLModel's name for a tensor of `text_encoder/`, None for the language head, which we leave out.

    The published checkpoint predates the split into language model and vision tower: it says `model.layers.…` and
    `visual.…` where transformers now writes `model.language_model.layers.…` and `model.visual.…`.
    """
    if stored == "lm_head.weight":
        return None
    name = stored.removeprefix("model.")
    return name if name.startswith(("language_model.", "visual.")) else f"language_model.{name}"


def build_text_encoder(config: dict) -> Any:
    """Qwen2.5-VL without its language head at the sizes of `text_encoder/config.json`, its weights on the meta device."""
    with init_empty_weights(include_buffers=False):  # the rotary frequencies are computed, not stored
        return Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(config))


def load_prompt_encoder(
    directory: ModelDirectory, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> PromptEncoder:
    """Reads `text_encoder/` and `processor/`, frozen and in evaluation mode, without the language head.

    Raises:
        InputError: weights are missing, unexpected or of another shape than the configuration's, or files are missing.
    """
    model = build_text_encoder(directory.config("text_encoder"))
    directory.load_into(model, "text_encoder", device, dtype, text_encoder_name)
    try:
        processor = Qwen2VLProcessor.from_pretrained(directory.path / "processor", local_files_only=True)
    except OSError as error:
        raise InputError(f"{directory.path / 'processor'} is incomplete: {str(error).splitlines()[0]}") from error
    return PromptEncoder(model.to(device).requires_grad_(False).eval(), processor, directory.edition)
