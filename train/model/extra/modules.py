"""Modules between `img_in` and the transformer's first block, which see what the transformer does not: where the edit is."""

import hashlib
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import InputError
from data_prep.model.encoders import LATENT_CHANNELS
from losses.batch import Scene
from losses.patches import PATCH

TARGET = "_target_"


class ExtraModule(nn.Module):
    """The base class of a module that is trained beside LoRA.

    The configuration names it: `adapter.modules={NAME: {_target_: my_package.MyModule, argument: value}}`. It is called in every
    forward pass of the transformer, after `img_in`. Several modules are called one after the other. A module must

    - start as the identity: before training, it returns its tokens unchanged, bit for bit. Initialise its last layer with zeros.
      This is checked.
    - treat each sample of a batch by itself, and draw no random numbers.
    - use all its parameters in every forward pass, whatever the scene. All are trained in float32; inside `forward` they are
      read in the dtype of the tokens. Register what must not be trained as a buffer with persistent=False.
    - be importable by its name wherever the adapter is used, because the file does not contain its class.

    Args:
        token_width: D, the width of a token, which the run gives.
    """

    def __init__(self, token_width: int):
        super().__init__()
        self.token_width = token_width

    def forward(self, tokens: Tensor, sigma: Tensor, scene: Scene) -> Tensor:
        """The tokens for the first block.

        Args:
            tokens: tokens of the picture to be, after `img_in`, (B, h/2 * w/2, D), row by row.
            sigma: position on the path in [0, 1], 1 = start, (B,), float32.
            scene: source, white and mask, (B, …, h, w), in the dtype of the tokens.

        Returns:
            Tokens, (B, h/2 * w/2, D).
        """
        raise NotImplementedError


class SpatialTemporalEncoder(ExtraModule):
    """Adds to each token what a small convolutional network makes of the source and of the mask there, and of sigma.

    The transformer sees the source as a reference, and no mask; here the source lies under the picture to be, cell by cell,
    beside the mask and each cell's place in the picture (space), and the network is modulated by sigma (time), as in FiLM (Perez
    et al. 2018, arXiv 1709.07871). Its last layer begins at zero, as in ControlNet (Zhang et al. 2023, arXiv 2302.05543).

    Args:
        token_width: D.
        hidden: number of channels of the added network, a multiple of 8.
        depth: number of residual layers. With n layers, a cell of 16 pixels sees n + 1 cells in each direction.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, token_width: int, hidden: int = 256, depth: int = 2):
        super().__init__(token_width)
        if hidden < 8 or hidden % 8:
            raise ValueError(f"hidden must be a multiple of 8, got {hidden}")
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        self.hidden = hidden
        channels = PATCH**2 * (LATENT_CHANNELS + 1) + 2
        self.enter = nn.Conv2d(channels, hidden, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(depth))
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * hidden * depth))
        self.leave = nn.Linear(hidden, token_width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, tokens: Tensor, sigma: Tensor, scene: Scene) -> Tensor:
        """As `ExtraModule.forward`."""
        source = scene.source_latents
        mask = torch.zeros_like(source[:, :1]) if scene.mask is None else scene.mask
        cells = F.pixel_unshuffle(torch.cat([source, mask], dim=1), PATCH)
        x = self.enter(torch.cat([cells, places(cells)], dim=1))
        modulation = self.time(waves(sigma, self.hidden).to(x.dtype))[:, :, None, None].chunk(
            2 * len(self.layers), dim=1
        )
        for layer, scale, shift in zip(self.layers, modulation[::2], modulation[1::2], strict=True):
            x = x + layer(F.silu(normalised(x) * (1 + scale) + shift))
        return tokens + self.leave(normalised(x).flatten(2).transpose(1, 2))


def places(grid: Tensor) -> Tensor:
    """Position of each cell's middle in the image, down and across in (-1, 1): (B, C, h, w) -> (B, 2, h, w)."""
    axes = [(2 * torch.arange(n, device=grid.device) + 1) / n - 1 for n in grid.shape[-2:]]
    both = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return both.to(grid.dtype).expand(len(grid), -1, -1, -1)


def waves(sigma: Tensor, width: int) -> Tensor:
    """Sine and cosine of sigma at frequencies from 1 to 1000 in a geometric series, (B,) -> (B, width).

    As positions are encoded by Vaswani et al. (2017, arXiv 1706.03762).
    """
    frequencies = 1000 ** torch.linspace(0, 1, width // 2, device=sigma.device)
    angles = sigma[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def normalised(x: Tensor) -> Tensor:
    """(B, C, h, w) with mean 0 and variance 1 in each of 8 groups of channels (Wu & He 2018, arXiv 1803.08494)."""
    return F.group_norm(x.float(), 8).to(x.dtype)


def build_module(where: str, node: Mapping[str, Any], token_width: int, seed: int = 0) -> ExtraModule:
    """The module that a node names, with the weights that it begins with, which depend on the seed and `where`.

    Only subclasses of `ExtraModule` are called, so that a file of somebody else's can name no function.

    Args:
        where: the node stands, for messages.
        node: `_target_`, and arguments.
        token_width: D.

    Raises:
        InputError: there is no such class, it is not a subclass, its arguments are wrong, or it has buffers to save.
    """
    target = str(node.get(TARGET))
    try:
        kind = resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{where} names {target}, which cannot be imported ({error}): put it on PYTHONPATH") from error
    if not (isinstance(kind, type) and issubclass(kind, ExtraModule)):
        raise InputError(f"{where}: {target} must be a subclass of train.model.extra.ExtraModule")
    digest = hashlib.blake2b(f"{seed}/{where}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest) >> 1)
        try:
            module = kind(token_width, **{str(name): value for name, value in node.items() if name != TARGET})
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} ({target}): {error}") from error
    if buffers := module.state_dict().keys() - dict(module.named_parameters()).keys():
        raise InputError(
            f"{where}: {target} has the buffer {min(buffers)!r}, which would not be saved: make it a parameter, or "
            "register it with persistent=False"
        )
    return module


@torch.no_grad()
def check_identity(where: str, module: ExtraModule) -> None:
    """Calls a new module on a small scene.

    Raises:
        InputError: it fails, or does not return the tokens that it was given.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, module.token_width, generator=generator)
    latents, mask = torch.randn(2, LATENT_CHANNELS, 4, 6, generator=generator), torch.ones(2, 1, 4, 6)
    for scene in Scene(latents, latents, mask), Scene(latents):
        try:
            returned = module(tokens, torch.tensor([1.0, 0.25]), scene)
        except Exception as error:  # whatever a user's own code raises
            raise InputError(f"{where}: {type(module).__name__} failed on a small scene: {error}") from error
        if not torch.equal(returned, tokens):
            raise InputError(
                f"{where}: {type(module).__name__} does not start as the identity, so it would change the model's output "
                "before any training: initialise its last layer with zeros"
            )
