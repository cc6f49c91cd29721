"""AdamW with warm-up and a schedule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.optim.state import clip_gradients


class AdamW:
    """AdamW with warm-up and a constant or cosine schedule (Loshchilov & Hutter, arXiv 1711.05101).

    Args:
        lr: peak learning rate.
        betas: decay rates of the running averages of the gradient and of its square.
        weight_decay: decoupled weight decay. Each step shrinks the weights by this share times the learning rate.
        eps: small number that is added to the denominator for numerical stability.
        warmup_steps: number of steps in which the learning rate rises linearly from 0.
        schedule: learning rate after the warm-up: "constant", or "cosine", which falls to 0 at `schedule_steps` and stays there.
        schedule_steps: step at which the cosine reaches 0. By default it is `train.num_steps`.
        ema: decay of an exponential moving average of the weights, such as 0.999. The average is validated and exported instead
            of the weights themselves. The decay at a step is min(ema, (1 + step) / (10 + step)), so the start is soon forgotten.
        bits: bits per number of the two moments. 8 quantises them in blocks (Dettmers et al. 2022, arXiv 2110.02861) and needs
            bitsandbytes.
        num_steps: length of the run, given by it.
        max_grad_norm: the norm that the gradients are scaled down to (`train.max_grad_norm`), given by the run; None: never.

    Raises:
        ValueError: an argument is out of its range, or bitsandbytes is not installed.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        bits: Literal[8, 32] = 32,
        schedule_steps: int | None = None,
        ema: float | None = None,
        num_steps: int = 1,
        max_grad_norm: float | None = None,
    ):
        if lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {lr}")
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"optim.schedule must be constant or cosine, got {schedule!r}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"optim.ema must lie between 0 and 1, got {ema}")
        if bits not in (8, 32):
            raise ValueError(f"optim.bits must be 8 or 32, got {bits}")
        kind: Any = torch.optim.AdamW if bits == 32 else _adamw_8bit()
        options: dict[str, Any] = {"fused": True} if bits == 32 and all(p.is_cuda for p in params) else {}
        options |= {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay}
        self.torch_optimizer = kind(params, **options)
        self.peak, self.warmup_steps, self.schedule = lr, warmup_steps, schedule
        self.schedule_steps, self.ema, self.max_grad_norm = schedule_steps or num_steps, ema, max_grad_norm

    def lr_at(self, step: int) -> float:
        """A pure function of the step, so that resuming needs no scheduler state."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.peak * warmup
        progress = max(0.0, step - self.warmup_steps) / max(1, self.schedule_steps - self.warmup_steps)
        return self.peak * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def clip_gradients(self) -> Tensor:
        """As `Optimizer.clip_gradients`."""
        return clip_gradients(self.torch_optimizer, self.max_grad_norm)

    def step(self, step: int) -> None:
        """One update at this step's learning rate."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()
        if self.ema is not None:
            self._average(min(self.ema, (1 + step) / (10 + step)))

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        """Moves the averages, which begin at the weights after the first step, towards the weights."""
        state = self.torch_optimizer.state
        for parameter in self._parameters():
            if "ema" not in state[parameter]:
                state[parameter]["ema"] = parameter.detach().clone()
        averages = [state[parameter]["ema"] for parameter in self._parameters()]
        torch._foreach_lerp_(averages, self._parameters(), weight=1 - decay)  # pyright: ignore

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.torch_optimizer.param_groups for parameter in group["params"]]

    def numbers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {"lr": self.torch_optimizer.param_groups[0]["lr"]}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average of the weights, if there is one; the weights come back exactly."""
        state = self.torch_optimizer.state
        held = [parameter for parameter in self._parameters() if "ema" in state.get(parameter, {})]
        before = [parameter.detach().clone() for parameter in held]
        with torch.no_grad():
            for parameter in held:
                parameter.copy_(state[parameter]["ema"])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(held, before, strict=True):
                    parameter.copy_(own)


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ValueError(f"optim.bits=8 needs bitsandbytes ({error}): run `uv pip install bitsandbytes`") from error
    return AdamW8bit
