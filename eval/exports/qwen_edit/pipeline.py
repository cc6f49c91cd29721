"""QwenImageEditPlusPipeline that samples an adapter as it was trained: a bridge from the source, at the adapter's sizes.

pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=FOLDER_OR_HUB_ID, trust_remote_code=True)
pipe.load_lora_weights("OWNER/NAME", weight_name="adapter_model.safetensors")
pipe(image=[image], prompt="Remove the sticker.").images[0]
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false
# diffusers says more of its types than it keeps

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from safetensors import safe_open

logger = logging.get_logger(__name__)
GEOMETRY = {"max_pixels": 1024 * 1024, "vision_pixels": 384 * 384, "reference_pixels": None}
SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


def bucket(width, height, area):
    """The sides in multiples of 32, within an area and within the image, whose aspect is nearest to the image's."""
    scale = min(1.0, math.sqrt(area / (width * height)))
    h = max(32, min(height * scale, area / max(32, width * scale)))
    w = max(32, min(width * scale, area / h))
    sides = [(math.floor(side / 32 + 1e-9) * 32, math.ceil(side / 32 - 1e-9) * 32) for side in (w, h)]
    fits = [(w, h) for w, h in itertools.product(*sides) if w <= max(32, width) and h <= max(32, height)]
    within = [(w, h) for w, h in fits if w * h <= area]
    return min(within, key=lambda s: (round(abs(math.log(s[1] * width / (s[0] * height))), 9), -s[0] * s[1]))


def vision_size(width, height, area):
    """What Qwen2.5-VL is shown of an image: of one area, in multiples of 32."""
    side = math.sqrt(area * width / height)
    return tuple(max(32, round(each / 32) * 32) for each in (side, side / (width / height)))


def inner_size(image, size):
    """The largest part of (width, height) that has the image's shape."""
    scale = min(size[0] / image.width, size[1] / image.height)
    return tuple(min(whole, max(1, round(side * scale))) for side, whole in zip(image.size, size, strict=True))


def corner(inner, size):
    """Left and top of a part in the middle."""
    return tuple((whole - part) // 2 for part, whole in zip(inner, size, strict=True))


def placed(image, size):
    """The whole image in the middle of (width, height), continued by its mirror image."""
    inner = inner_size(image, size)
    image = ImageOps.fit(image, inner, Image.Resampling.LANCZOS)
    (left, top), (right, bottom) = corner(inner, size), (size[0] - inner[0], size[1] - inner[1])
    gaps = [(top, bottom - top), (left, right - left), (0, 0)]
    return Image.fromarray(np.pad(np.asarray(image), gaps, mode="symmetric"))


class QwenEditPipeline(QwenImageEditPlusPipeline):
    """Sampling and sizes follow the header of the first adapter's file. Without one: flow matching, at sizes of at most one
    megapixel that are multiples of 32 (`--geometry own` of the framework that this is from)."""

    header = {}  # noqa: RUF012

    def load_lora_weights(self, name, weight_name="adapter_model.safetensors", **kwargs):
        """As diffusers': of a file, a folder, a hub id or a state dict, which has no header: set `header` for a bridge."""
        if isinstance(name, dict):
            super().load_lora_weights(name, **kwargs)
            return
        folder = kwargs.pop("subfolder", None)
        path = Path(name, folder or "", weight_name) if Path(name).is_dir() else Path(name)
        if not path.is_file():
            known = ("revision", "cache_dir", "token", "local_files_only")
            options = {key: kwargs[key] for key in known if key in kwargs}
            path = Path(hf_hub_download(name, weight_name, subfolder=folder, **options))
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        if "extra_modules" in header:
            logger.warning("this adapter was trained with modules beside LoRA, which diffusers does not load")
        super().load_lora_weights(str(path.parent), weight_name=path.name, **kwargs)
        self.header = self.header or header

    def unload_lora_weights(self, *args, **kwargs):
        """As diffusers'."""
        super().unload_lora_weights(*args, **kwargs)
        self.header = {}

    @property
    def _is_first(self):
        """Whether the adapter was trained on the first Qwen-Image-Edit, of August 2025."""
        return self.header.get("base_pipeline") == "QwenImageEditPipeline"

    def _get_qwen_prompt_embeds(self, prompt=None, image=None, device=None, dtype=None):
        """As diffusers', with `mm_token_type_ids`, without which image tokens lose their M-RoPE positions."""
        name = "" if self._is_first else "Picture {}: "  # the first Qwen-Image-Edit knows one picture, without a number
        pictures = "".join(
            name.format(n + 1) + "<|vision_start|><|image_pad|><|vision_end|>" for n in range(len(image))
        )
        text = self.prompt_template_encode.format(pictures + (prompt if isinstance(prompt, str) else prompt[0]))
        inputs = self.processor(text=[text], images=image, return_tensors="pt").to(device or self._execution_device)
        states = self.text_encoder(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        embeds = states[:, self.prompt_template_encode_start_idx :]
        return embeds.to(dtype or embeds.dtype), embeds.new_ones(embeds.shape[:2], dtype=torch.long)

    def _tokens(self, image, size):
        """The packed latents of an image, cropped to (width, height), and their grid."""
        pixels = self.image_processor.preprocess(ImageOps.fit(image, size, Image.Resampling.LANCZOS)).unsqueeze(2)
        latents = self._encode_vae_image(pixels.to(self._execution_device, self.vae.dtype), None).float()
        return self._pack_latents(latents, 1, *latents.shape[1:2], *latents.shape[3:]), (
            1,
            size[1] // 16,
            size[0] // 16,
        )

    def _bridge(self, image, size, steps, start):
        """The sigmas of a bridge, and where it begins."""
        trained = json.loads(self.header.get("loss", "{}")).get("sub_prob")  # how often it began at white
        start = start or ("white" if trained == 1 else "source")
        starts = ("source",) if trained == 0 else ("source", "white")
        if start not in starts:
            raise ValueError(f"this bridge begins at {' or '.join(starts)}, not at {start!r}")
        sigmas = [1 - step / steps for step in range(steps + 1)]
        known = json.loads(self.header.get("sigmas", "null")) or sigmas
        if any(all(abs(sigma - each) > 1e-3 for each in known) for sigma in sigmas[:-1]):
            logger.warning(f"the adapter was trained at sigma {known}, and {steps} steps visit others")
        return sigmas, self._tokens(Image.new("RGB", size, "white") if start == "white" else image, size)[0]

    def _flow(self, size, steps, generator):
        """Qwen's sigmas, and noise."""
        shape = (1, size[0] * size[1] // 256, 4 * self.latent_channels)
        sigmas = [1.0, 0.0]
        if steps > 1:  # the stretch to the last sigma divides 0 by 0 at one step
            mu = calculate_shift(shape[1], *(self.scheduler.config[name] for name in SHIFT))
            self.scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=mu)
            sigmas = self.scheduler.sigmas.tolist()
        return sigmas, randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    @torch.no_grad()
    def __call__(
        self, image, prompt, negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=None, start=None,
        height=None, width=None, generator=None, latents=None, output_type="pil", return_dict=True,
    ):  # fmt: skip
        """Edits the first image; further ones are references.

        Args:
            negative_prompt, true_cfg_scale: of flow matching alone; a scale of 1 is without guidance.
            num_inference_steps: by default 4 for a bridge, 40 for flow matching.
            start: of a bridge, "source" or "white"; by default as it was trained.
            height, width: multiples of 32, to which the image is cropped; by default the image's, whole, within the adapter's
                largest area.
            latents: packed, to start from instead.
        """
        given = image if isinstance(image, list) else [image]
        images = [ImageOps.exif_transpose(each).convert("RGB") for each in given]
        if self._is_first and len(images) > 1:
            raise ValueError(f"the first Qwen-Image-Edit edits one image, got {len(images)}")
        geometry = GEOMETRY | json.loads(self.header.get("geometry", "{}"))
        size = (width, height) if width and height else bucket(*images[0].size, geometry["max_pixels"])
        sizes = [bucket(*each.size, geometry["reference_pixels"] or geometry["max_pixels"]) for each in images]
        aspects = images[0].height * size[0] / (images[0].width * size[1])
        if geometry["reference_pixels"] is None and abs(aspects - 1) <= 0.01:
            sizes[0] = size  # the source has the grid of the result
        whole = not (width and height)
        source = placed(images[0], size) if whole else images[0]
        framed = [placed(images[0], sizes[0]), *images[1:]] if whole else images
        references, grids = zip(*map(self._tokens, framed, sizes), strict=True)
        seen = [
            each.resize(vision_size(*each.size, geometry["vision_pixels"]), Image.Resampling.BICUBIC) for each in images
        ]
        bridge = self.header.get("objective") == "lbm"
        prompts = [prompt or " "] if bridge or true_cfg_scale <= 1 else [prompt or " ", negative_prompt or " "]
        embeds = [self._get_qwen_prompt_embeds(each, seen)[0].to(self.transformer.dtype) for each in prompts]
        steps = num_inference_steps or (4 if bridge else 40)
        sigmas, x = self._bridge(source, size, steps, start) if bridge else self._flow(size, steps, generator)
        x = x if latents is None else latents.to(x)
        shapes = [[(1, size[1] // 16, size[0] // 16), *grids]]
        with self.progress_bar(total=steps) as bar:
            for sigma, following in itertools.pairwise(sigmas):
                tokens, time = torch.cat([x, *references], dim=1).to(self.transformer.dtype), x.new_full([1], sigma)
                given = {"hidden_states": tokens, "timestep": time, "img_shapes": shapes, "return_dict": False}
                velocity, *negative = (
                    self.transformer(encoder_hidden_states=each, **given)[0][:, : x.shape[1]].float() for each in embeds
                )
                for each in negative:  # guidance, at the length of the unguided velocity
                    guided = each + true_cfg_scale * (velocity - each)
                    velocity = guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
                x = x - (sigma - following) * velocity
                bar.update()
        if output_type == "latent":
            pictures = x
        else:
            mean, std = (
                torch.tensor(self.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
            )
            x = self._unpack_latents(x, size[1], size[0], self.vae_scale_factor) * std.to(x) + mean.to(x)
            pixels = self.vae.decode(x.to(self.vae.dtype), return_dict=False)[0][:, :, 0]
            inner = inner_size(images[0], size) if whole else size
            left, top = corner(inner, size)
            pixels = pixels[..., top : top + inner[1], left : left + inner[0]]
            pictures = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return QwenImagePipelineOutput(images=pictures) if return_dict else (pictures,)
