"""What a sampler is given and gives, and what it leaves as it is."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Protocol

from torch import Tensor

from losses.batch import Condition, Edit
from losses.randomness import SampleRandom

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""`velocity = denoiser(latents (B, 16, h, w), sigma (B,), condition)`."""

OnStep = Callable[[int, Tensor], None]
"""Called after every step with the number of steps done and the latents (B, 16, h, w)."""


@dataclass(frozen=True)
class Keep:
    """What sampling leaves as it is: after every step the latents outside the mask are put where their own path is."""

    latents: Tensor
    """Latents of the image that is kept, (B, 16, h, w)."""
    mask: Tensor
    """1 where the edit may go, 0 where nothing changes, between them a blend, (B, 1, h, w)."""

    def blend(self, latents: Tensor, start: Tensor, sigma: float, noise: Tensor | float = 0.0) -> Tensor:
        """The latents inside the mask, and outside the point at `sigma` of the path from `start` to what is kept.

        Args:
            noise: of a stochastic path, how far it is from the straight line at `sigma`.
        """
        kept = sigma * start + (1 - sigma) * self.latents + noise
        return self.mask * latents + (1 - self.mask) * kept


class Sampler(Protocol):
    """Latents of the edited images, (B, 16, h, w), float32."""

    def __call__(
        self,
        denoiser: Velocity,
        edit: Edit,
        num_steps: int,
        generator: SampleRandom,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
    ) -> Tensor: ...

    @property
    def guided(self) -> bool:
        """Whether the edit needs a negative condition."""
        ...

    @property
    def draws(self) -> bool:
        """Whether another seed gives another picture."""
        ...

    def calls(self, num_steps: int) -> int:
        """How often `on_step` is called."""
        ...


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """Its class and settings, for JSON."""
    assert is_dataclass(sampler)
    assert not isinstance(sampler, type)
    return {"name": type(sampler).__name__, **asdict(sampler)}
