"""Tiny random pipelines of the other base models, built with the library's own classes and saved in its own layout."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz,.' "
WIDTH = 32
"""Of text embeddings."""


def write_sd(folder: Path, checker_flags: bool | None = False, inpainting: bool = False) -> Path:
    """Stable Diffusion 1.5 in miniature. Returns the folder.

    Args:
        checker_flags: whether its safety checker flags every picture, or none; None: it has no checker.
        inpainting: the variant whose UNet reads the mask and the masked picture, 9 channels.
    """
    torch.manual_seed(0)
    has_checker = checker_flags is not None
    cls = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
    pipeline = cls(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_text()),
        tokenizer=_clip_tokenizer(),
        unet=_unet(9 if inpainting else 4, cross_attention_dim=WIDTH),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=_safety_checker(checker_flags) if has_checker else None,
        feature_extractor=CLIPImageProcessor(size=30, crop_size=30) if has_checker else None,
        requires_safety_checker=has_checker,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL in miniature, with both text encoders. Returns the folder."""
    torch.manual_seed(1)
    micro_conditions = 6 * 8
    unet = _unet(
        4,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=micro_conditions + WIDTH,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_text()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text()),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_kontext(folder: Path) -> Path:
    """FLUX.1 Kontext in miniature, distilled guidance included. Returns the folder."""
    torch.manual_seed(2)
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_pieces()], extra_ids=0)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(_clip_text()),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {"sd15": write_sd, "sdxl": write_sdxl, "flux-kontext": write_kontext}
"""By the base's name."""


def _unet(in_channels: int, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def _vae(latent_channels: int, **options: object) -> AutoencoderKL:
    """With the real down-sampling factor of 8."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        **options,
    )


def _clip_text() -> CLIPTextConfig:
    tokenizer = _clip_tokenizer()
    return CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        projection_dim=WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """One token a letter, and one for a letter that ends a word."""
    pieces = [*LETTERS.strip(), *(f"{letter}</w>" for letter in LETTERS.strip()), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _pieces() -> list[tuple[str, float]]:
    return [("▁", -2.0), *((letter, -3.0) for letter in LETTERS.strip())]


def _safety_checker(flags: bool) -> StableDiffusionSafetyChecker:
    """It flags a picture whose similarity to a concept is above a threshold."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=1,
        image_size=30,
        patch_size=15,
    )
    config = CLIPConfig(text_config=_clip_text().to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker
