"""The nodes: what the adapter says, pictures at its sizes, its text encoding, and a bridge's start and steps.

A bridge starts at the source's latents, not at noise. `SamplerCustomAdvanced` asks a NOISE object for its noise, and
`CONST.noise_scaling` begins at `sigma * noise + (1 - sigma) * latent_image`: at sigma = 1, a NOISE that returns the source's
latents is where it begins. Noise counts as the model sees latents, `latent_image` as the VAE gives them: hence
`process_latent_in`.
"""

import torch

from .header import read_settings
from .sizes import covered, size_of, stretched

CATEGORY = "bridge"
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
METHODS = ("as the model says", "index_timestep_zero", "index")
"""How references are seen: at time 0 (2511), or at the sampler's time (2509)."""


class BridgeSettings:
    """Reads an adapter's header."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Says how an adapter was trained. The adapter itself is loaded by LoraLoaderModelOnly."
    RETURN_TYPES = ("BRIDGE_SETTINGS", "STRING")
    RETURN_NAMES = ("settings", "text")
    FUNCTION = "read"

    @classmethod
    def INPUT_TYPES(cls):
        import folder_paths

        return {"required": {"lora_name": (folder_paths.get_filename_list("loras"),)}}

    def read(self, lora_name):
        """The settings, and the same in words."""
        import folder_paths

        settings = read_settings(folder_paths.get_full_path_or_raise("loras", lora_name), lora_name)
        return settings, settings.text


class BridgeFit:
    """Pictures at the adapter's sizes."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Resizes the source and up to two references as they were in training. Leave out other resizing."
    RETURN_TYPES = ("IMAGE", "BRIDGE_REFERENCES", "INT", "INT")
    RETURN_NAMES = ("source", "references", "width", "height")
    FUNCTION = "fit"

    @classmethod
    def INPUT_TYPES(cls):
        more = {"reference_2": ("IMAGE",), "reference_3": ("IMAGE",)}
        return {"required": {"settings": ("BRIDGE_SETTINGS",), "source": ("IMAGE",)}, "optional": more}

    def fit(self, settings, source, reference_2=None, reference_3=None):
        """The source at the result's size, where a bridge starts; and of each picture what the VAE and the text encoder see."""
        geometry, size = settings.geometry, size_of(source)
        others = [image for image in (reference_2, reference_3) if image is not None]
        sizes = [geometry.source_size(size), *(geometry.reference_size(size_of(image)) for image in others)]
        references = [
            (covered(image, its_size), stretched(image, geometry.vision_size(size_of(image))))
            for image, its_size in zip([source, *others], sizes, strict=True)
        ]
        height, width = geometry.result_size(size)
        return covered(source, (height, width)), references, width, height


class BridgeEncode:
    """The instruction with its pictures."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "As TextEncodeQwenImageEditPlus, which has sizes of its own, but with pictures as Bridge Fit gives them."
    )
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls):
        prompt = ("STRING", {"multiline": True, "dynamicPrompts": True})
        needed = {"clip": ("CLIP",), "vae": ("VAE",), "references": ("BRIDGE_REFERENCES",), "prompt": prompt}
        return {"required": {**needed, "reference_method": (list(METHODS),)}}

    def encode(self, clip, vae, references, prompt, reference_method):
        """The conditioning, with the references' latents."""
        pictures = "".join(PICTURE.format(number) for number in range(1, len(references) + 1))
        tokens = clip.tokenize(pictures + prompt, images=[vision for _, vision in references], llama_template=TEMPLATE)
        values = {"reference_latents": [vae.encode(image) for image, _ in references]}
        if reference_method != METHODS[0]:
            values["reference_latents_method"] = reference_method
        return ([[embedding, {**own, **values}] for embedding, own in clip.encode_from_tokens_scheduled(tokens)],)


class BridgeStart:
    """A bridge's start as NOISE."""

    CATEGORY = CATEGORY
    DESCRIPTION = "For SamplerCustomAdvanced: it starts at these latents, the source's or white's, and draws nothing."
    RETURN_TYPES = ("NOISE",)
    FUNCTION = "start"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "latent": ("LATENT",)},
            "optional": {"settings": ("BRIDGE_SETTINGS",)},
        }

    def start(self, model, latent, settings=None):
        """The NOISE object.

        Raises:
            ValueError: the adapter is no bridge.
        """
        if settings is not None and settings.objective != "lbm":
            raise ValueError(
                f"the adapter was trained with the objective {settings.objective}, not as a bridge: it starts from RandomNoise"
            )
        samples = latent["samples"]
        if getattr(model.get_model_object("latent_format"), "latent_dimensions", 2) == 3 and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        seen = model.get_model_object("process_latent_in")(samples.float())
        scale = getattr(model.get_model_object("model_sampling"), "noise_scale", 1.0)
        return (StartNoise(seen / scale),)


class StartNoise:
    """What ComfyUI calls NOISE: here it is no noise, and the same every time.

    Args:
        start: the latents as the model sees them.
    """

    seed = 0

    def __init__(self, start):
        self._start = start

    def generate_noise(self, input_latent):
        """The start, on the CPU, for each of the latents' batch.

        Raises:
            ValueError: the latents that are sampled have another shape.
        """
        shape = input_latent["samples"].shape
        if self._start.shape[1:] != shape[1:] or self._start.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"the bridge starts at latents of shape {tuple(self._start.shape)}, and latent_image has {tuple(shape)}: give "
                "the same latent to both nodes"
            )
        return self._start.expand(shape).clone().cpu()


class BridgeSigmas:
    """Even steps."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Sigmas from 1 to 0 in equal steps, without the shift that a scheduler's would have."
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "sigmas"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": ("INT", {"default": 4, "min": 1, "max": 100})}}

    def sigmas(self, steps):
        """`steps` + 1 of them."""
        return (torch.linspace(1.0, 0.0, steps + 1),)


NODE_CLASS_MAPPINGS = {
    each.__name__: each for each in (BridgeSettings, BridgeFit, BridgeEncode, BridgeStart, BridgeSigmas)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "BridgeSettings": "Bridge Settings (of an adapter)",
    "BridgeFit": "Bridge Fit (pictures at the adapter's sizes)",
    "BridgeEncode": "Bridge Encode (instruction and pictures)",
    "BridgeStart": "Bridge Start (as noise)",
    "BridgeSigmas": "Bridge Sigmas (even)",
}
