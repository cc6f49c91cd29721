"""On which devices and in which data types the parts of a model are, checked before anything is loaded."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch

from data_prep.errors import InputError
from eval.request.metadata import stored_digest
from eval.request.options import OffloadName, WeightsName
from train.model.quantize import STORED, Weights, check_weights, has_products

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CPU = torch.device("cpu")
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Placement:
    """Devices and data types of the parts of a model. docs/memory.md says what each choice saves and costs.

    Raises:
        InputError: this machine, or the packages that are installed, cannot serve it.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.bfloat16
    encoder_device: torch.device | None = None
    """Device of the text encoder and the VAE; None for `device`."""
    offload: OffloadName = "none"
    """`model`: only the parts in use are on `device`, the others wait in CPU memory (freed if `device` is the CPU).
    `layer`: the transformer's blocks come from CPU memory one after the other, the next while one computes."""
    weights: WeightsName = "full"
    """Format of the linear layers in the transformer's blocks: `full` for `dtype`, or quantised as they are read. `device` may
    multiply int8 and fp8 as they are, and then rounds activations too."""
    gguf: Path | None = None
    """A GGUF file to read the transformer from instead of the model's own; its layers stay as they are in it."""
    vae_tiling: bool = False
    """Encode and decode in overlapping tiles of 512 x 512 pixels."""
    compile: bool = False
    """Compile the transformer's block: its first picture of a kind takes longer, and the steps of all others less."""

    def __post_init__(self):
        for device in {self.device, self.home_of_encoders}:
            _check_device(device)
        if self.offload not in get_args(OffloadName):
            raise InputError(f"offload is one of {', '.join(get_args(OffloadName))}, got {self.offload!r}")
        if self.weights not in get_args(WeightsName):
            raise InputError(f"weights is one of {', '.join(get_args(WeightsName))}, got {self.weights!r}")
        self._check_offload()
        self._check_weights()

    @property
    def home_of_encoders(self) -> torch.device:
        """Where the text encoder and the VAE compute."""
        return self.encoder_device or self.device

    @property
    def format(self) -> Weights:
        """`weights`, as the training calls it."""
        return "bf16" if self.weights == "full" else self.weights

    @property
    def numbers(self) -> dict[str, Any]:
        """What a picture depends on, for its settings: device and `dtype`, and what is not as it is by default."""
        own = {
            "weights": self.weights if self.weights != "full" else None,
            "products": self.weights if self._in_8_bits else None,
            "gguf": stored_digest(self.gguf) if self.gguf else None,
            "vae_tiling": self.vae_tiling or None,
            "compile": self.compile or None,
        }
        given = {name: value for name, value in own.items() if value is not None}
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch."), **given}

    @property
    def shown(self) -> dict[str, Any]:
        """The same for a report, with the device as people call it."""
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else str(self.device)
        return {"compile": False, **self.numbers, "device": name}

    @property
    def _in_8_bits(self) -> bool:
        """Whether products are computed in the format of the weights."""
        return self.weights != "full" and has_products(self.device, STORED[self.weights], self.dtype)

    def _check_offload(self) -> None:
        if self.offload == "layer" and self.device.type == "cpu":
            raise InputError(
                "offload=layer streams blocks to a device such as cuda, but the device is cpu: use offload=model, which frees "
                "the parts that are not in use"
            )

    def _check_weights(self) -> None:
        if self.gguf:
            _check_gguf(self.gguf)
        if self.gguf and self.weights != "full":
            raise InputError(
                f"gguf and weights={self.weights} both set the format of the transformer's weights: use only one of them"
            )
        if (self.gguf or self.weights != "full") and self.dtype == torch.float16:
            raise InputError("quantised weights compute in bfloat16 or float32: float16 would overflow")
        if self.weights == "fp8" and self.device.type == "mps":
            raise InputError("weights=fp8 is not supported on mps: use weights=int8")
        check_weights(self.format, "weights")
        if self.weights == "nf4" and self.device.type == "mps":
            raise InputError("weights=nf4 is not supported on mps: use weights=int8")


def make_placement(
    device: str | None = None,
    dtype: str | None = None,
    encoder_device: str | None = None,
    offload: OffloadName = "none",
    weights: WeightsName = "full",
    gguf: Path | None = None,
    vae_tiling: bool = False,
    compile: bool = False,
) -> Placement:
    """A placement from the words of a command line.

    Args:
        device, encoder_device: `cpu`, `cuda`, `cuda:1`, …; by default a GPU if there is one.
        dtype: `bfloat16`, `float16` or `float32`; by default bfloat16 on a GPU.

    Raises:
        InputError: a word has no meaning, or this machine cannot serve it.
    """
    has_gpu = torch.cuda.is_available()
    device, dtype = device or ("cuda" if has_gpu else "cpu"), dtype or ("bfloat16" if has_gpu else "float32")
    if dtype not in DTYPES:
        raise InputError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    encoders = _device(encoder_device) if encoder_device else None
    return Placement(_device(device), DTYPES[dtype], encoders, offload, weights, gguf, vae_tiling, compile)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device  # one name for one device
    except RuntimeError:
        raise InputError(f"there is no device {text!r}: use cpu, cuda, cuda:1, …") from None


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device} needs a GPU, and torch finds none here: use device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {device}: this machine has {torch.cuda.device_count()} GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps needs an Apple GPU, and torch finds none here: use device=cpu")


def _check_gguf(path: Path) -> None:
    if find_spec("gguf") is None:
        raise InputError("a GGUF file needs the package gguf: pip install gguf")
    if not path.is_file():
        raise InputError(f"no GGUF file at {path}")
    with path.open("rb") as opened:
        if opened.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise InputError(f"{path} is not a GGUF file")
