"""How long a step takes, from what it computes, copies and communicates."""

from dataclasses import dataclass

from train.config import ParallelConfig
from train.plan.gpus import Gpu

UTILISATION = {"compiled": 0.47, "plain": 0.34}
"""Share of the GPU's peak that training reaches: measured on one H200 in bf16 (docs/performance.md), and assumed of other GPUs
and of 8-bit products, whose rounding is counted besides."""
BUSY = 0.85
"""Share of its peak that the GPU's memory reaches (docs/performance.md)."""
LINK_BUSY = 0.8
"""The same of PCIe and NVLink: an estimate."""
BOOKKEEPING = 0.012
"""Seconds that DeepSpeed's ZeRO-3 takes on the processor for a block of a forward pass: measured (docs/performance.md)."""
GIGA = 1e9


@dataclass(frozen=True)
class Step:
    """What one GPU does in a step."""

    flops: int
    """Operations in the model's dtype."""
    flops_8bit: int = 0
    """Operations of 8-bit products."""
    forward: float = 1 / 3
    """The forward passes' share of all operations."""
    rounded: float = 0.0
    """Bytes read and written in the GPU's memory to round and to widen numbers."""
    copied: int = 0
    """Bytes copied to it from the machine's memory while it computes, half of them in forward passes."""
    gathered: int = 0
    """Bytes received from the other GPUs while it computes, half of them in forward passes: ZeRO-3's weights."""
    reduced: int = 0
    """Bytes received from them when it has computed: gradients, and ZeRO-2's weights."""
    fetched_blocks: int = 0
    """Blocks that ZeRO-3 brings for the forward passes."""

    def computing(self, gpu: Gpu, weights: str, utilisation: float) -> float:
        """Seconds without any waiting."""
        assert gpu.tflops is not None
        seconds = self.flops / (gpu.tflops * 1e12 * utilisation)
        if self.flops_8bit:
            seconds += self.flops_8bit / ((gpu.products(weights) or gpu.tflops) * 1e12 * utilisation)
        return seconds + (self.rounded / (gpu.bandwidth * GIGA * BUSY) if self.rounded else 0.0)

    def copying(self, gpu: Gpu) -> float:
        """Seconds that copies and gathered weights take beside the computation; the two share PCIe where there is no NVLink."""
        copies, gathers = (n / (rate * GIGA * LINK_BUSY) if n else 0.0 for n, rate in self._beside(gpu))
        return max(copies, gathers) if gpu.nvlink else copies + gathers

    def reducing(self, gpu: Gpu) -> float:
        """Seconds in which nothing else happens."""
        return self.reduced / (gpu.link * GIGA * LINK_BUSY) if self.reduced else 0.0

    def seconds(self, gpu: Gpu, weights: str, utilisation: float) -> float:
        """Seconds of the step: forward and backward passes each take as long as the longer of computing and copying."""
        computing, copying = self.computing(gpu, weights, utilisation), self.copying(gpu)
        forward, backward = computing * self.forward, computing * (1 - self.forward)
        forward = max(forward, copying / 2, self.fetched_blocks * BOOKKEEPING)
        return forward + max(backward, copying / 2) + self.reducing(gpu)

    def _beside(self, gpu: Gpu) -> list[tuple[int, float]]:
        return [(self.copied, gpu.pcie), (self.gathered, gpu.link)]


def communication(
    parallel: ParallelConfig, world_size: int, passes: int, grad_accum_steps: int, frozen: int, lora: int
) -> tuple[int, int]:
    """Bytes that each rank receives in a step (and sends as many): while it computes, and when it has computed.

    A ring passes (n - 1) / n of what is gathered through each rank, and twice as much of what is added up.

    Args:
        passes: forward passes of a step. ZeRO-3 gathers each block once for it and once for its backward pass, whatever
            is computed again.
        frozen, lora: bytes of frozen weights and of LoRA weights in float32.
    """
    ring = (world_size - 1) / world_size
    if parallel.stage == 3:
        return round(2 * passes * ring * frozen), round(2 * ring * lora)
    if parallel.stage == 2:  # added up in each backward pass; then whole gradients for the masters, and weights
        return 0, round((2 * grad_accum_steps + 2 + 1) * ring * lora)
    return 0, round(2 * ring * lora)
