"""How blocks are executed: what their backward passes compute again, and whether they are compiled."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.model.attention import Kernel, torch_attention
from train.model.block import Block, modulations, transform

Keep = Literal["all", "products", "attention", "nothing"]
"""What a block keeps for its backward pass: all that autograd wants; the outputs of matrix products and attention, from
which the rest is computed again cheaply; attention's output, the dearest a byte; or nothing but its input."""

MAX_GRAPHS = 64
"""Compilations of one way of keeping; what would need another is computed as it is. Two (the last block is another) for each
kind of batch: one sample, several with texts of one length, each number of samples with texts of different lengths; all
that again without references, and again without gradients (validation), and so without the adapter (`loss.preserve`)."""

Outputs = tuple[Tensor, Tensor, Tensor]

_aten = torch.ops.aten
ATTENTION = {
    *(getattr(_aten, f"_scaled_dot_product_{name}_attention").default for name in ("flash", "cudnn", "efficient")),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
PRODUCTS = {
    *(*ATTENTION, _aten.mm.default, _aten.addmm.default),
    *(torch.ops.qwen_edit.low_rank_linear.default, torch.ops.qwen_edit.quantized_linear.default),
}


@dataclass(frozen=True)
class Execution:
    """How the blocks of a transformer are executed.

    Attributes:
        keep: what blocks keep.
        num_first: so many of the first blocks keep `first` instead.
        first: what those keep.
        compiled: by `torch.compile`.
        attention: the kernel of their attention.
        say: is told of compilations and of their failing.
    """

    keep: Keep = "all"
    num_first: int = 0
    first: Keep = "attention"
    compiled: bool = False
    attention: Kernel = torch_attention
    say: Callable[[str], None] = print

    @classmethod
    def of(cls, gradient_checkpointing: str | int, **options: Any) -> "Execution":
        """As `train.gradient_checkpointing` says (not `auto`): `off`, `selective`, `full`, or a number of blocks."""
        if isinstance(gradient_checkpointing, int):
            return cls("products", gradient_checkpointing, **options)
        keeps: dict[str, Keep] = {"off": "all", "selective": "products", "full": "nothing"}
        return cls(keeps[gradient_checkpointing], **options)

    def kept(self, num_blocks: int) -> list[Keep]:
        """What each block keeps."""
        return [self.first if index < self.num_first else self.keep for index in range(num_blocks)]

    def apply(self, blocks: Any) -> None:
        """From now on the blocks are executed so."""
        run = functools.cache(self._run)
        for block, keep in zip(blocks, self.kept(len(blocks)), strict=True):
            block.attention, block.run = self.attention, run(keep)

    def _run(self, keep: Keep) -> Callable[..., Any]:
        return Compiled(RUNS[keep], self.say) if self.compiled else RUNS[keep]


def keep_all(block: Block, output: Tensor, reference: Tensor, text: Tensor, embedded: Tensor, *rest: Any) -> Outputs:
    """Computes a block."""
    return transform(block, modulations(block, embedded, len(output)), output, reference, text, *rest)


def keep_products(block: Block, *args: Any) -> Outputs:
    """Computes a block, whose cheap parts are computed again in the backward pass."""
    return _recomputed(block, *args, keep=_keep_products)


def keep_attention(block: Block, *args: Any) -> Outputs:
    """Computes a block, of which all but attention is computed again in the backward pass."""
    return _recomputed(block, *args, keep=_keep_attention)


def keep_nothing(block: Block, *args: Any) -> Outputs:
    """Computes a block, which is computed again in the backward pass."""
    return _recomputed(block, *args)


RUNS: dict[Keep, Callable[..., Outputs]] = {
    **{"all": keep_all, "products": keep_products, "attention": keep_attention, "nothing": keep_nothing}
}


def _recomputed(
    block: Block,
    output: Tensor,
    reference: Tensor,
    text: Tensor,
    embedded: Tensor,
    *rest: Any,
    keep: Callable[..., CheckpointPolicy] | None = None,
) -> Outputs:
    """Under a policy of what is kept. The modulation, which is small, always is."""
    modulation = modulations(block, embedded, len(output))
    arguments = (block, modulation, output, reference, text, *rest)
    if not torch.is_grad_enabled():
        return transform(*arguments)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep is not None:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
    return checkpoint(transform, *arguments, **options)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class Compiled:
    """A compiled form of a function of a block. One that cannot be compiled is named, and computed as it is.

    Each graph is tried on one block, forward and backward, before it is used: PyTorch compiles the backward pass only when
    it runs, where nothing could be done about a failure.
    """

    def __init__(self, function: Callable[..., Any], say: Callable[[str], None], backend: Any = "inductor"):
        symbolic_shapes.use_duck_shape = False  # sizes that happen to be equal stay independent
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        self.function, self.say, self.failed = function, say, False
        self.say_once = functools.cache(say)
        self.compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def __call__(self, block: Block, *args: Any) -> Outputs:
        """As the function."""
        if self.failed:
            return self.function(block, *args)
        try:
            return self._compiled(block, *args)
        except torch.OutOfMemoryError:
            raise
        except FailOnRecompileLimitHit:  # the graphs that there are stay in use
            self.say_once(f"a kind of batch runs without torch.compile, because there are already {MAX_GRAPHS} graphs")
            return self.function(block, *args)
        except Exception as error:  # whatever a compiler raises; an error of the function itself is raised again here
            outputs = self.function(block, *args)
            self.failed = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.say(f"continuing without torch.compile, which failed: {reason}")
            return outputs

    def _compiled(self, block: Block, *args: Any) -> Outputs:
        graphs, start = counters["stats"]["unique_graphs"], time.perf_counter()
        outputs = self.compiled(block, *args)
        if counters["stats"]["unique_graphs"] == graphs:
            return outputs
        if any(output.requires_grad for output in outputs):
            wanted = [each for each in (*args[:3], *block.parameters()) if each.requires_grad]
            total = torch.stack([output.float().sum() for output in outputs if output.requires_grad]).sum()
            torch.autograd.grad(total, wanted, allow_unused=True)
            outputs = self.compiled(block, *args)
        self.say(f"compiled a block in {time.perf_counter() - start:.0f} s")
        return outputs
