"""Counts the bytes that a training step's operations read and write, on the meta device, in seconds, without GPU and weights.

    python scripts/bench/traffic.py
    python scripts/bench/traffic.py --side 512 --gpu H100 --json traffic.json
    python scripts/bench/traffic.py --tiny

The project's own denoiser with LoRA runs forward and backward with 2 and with 3 blocks. The difference is the cost of a
block, and a step has `--layers` blocks. Each operation counts its inputs and outputs once. "Pointwise" is
everything but matrix products and attention, which can be fused. This is for eager mode; `torch.compile` fuses most of it, and
only a GPU's profile shows what is left then (`train_step.py --profile`).

If the meta device computes differently from a GPU, the GPU's operations are counted: attention is flash attention's operation;
RMSNorm is one operation (that of layer norm, which moves the same bytes); a linear layer with LoRA is one
(`qwen_edit::low_rank_linear`), which counts as a matrix product. Its float32 weights, which are not read, are not counted.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.errors import exit_codes
from data_prep.model.encoders import LATENT_CHANNELS
from data_prep.model.geometry import LATENT_CELL
from losses.batch import Condition
from scripts.bench.report import Report, environment
from scripts.gpu_smoke import REAL, SHIPPED
from train.config import DEFAULT_TARGETS
from train.model.adapter import attach_lora
from train.model.denoiser import Denoiser, build_dit
from train.model.execution import Execution
from train.plan.memory import META, flash_attention

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh"}
"""Operations that touch no memory, beside views."""
PRODUCTS = {
    *("mm", "addmm", "addmm_", "bmm", "low_rank_linear", "low_rank_linear_backward"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
}
NOT_READ = {"low_rank_linear": (6, 7)}
"""Arguments that are only there to receive gradients."""
BANDWIDTH = {
    "B300": 8.0,
    "B200": 8.0,
    "H200": 4.8,
    "H100": 3.35,
    "RTX PRO 6000": 1.79,
    "RTX 5090": 1.79,
    "RTX 4090": 1.01,
}
"""TB/s, from the maker's data sheet."""
CHECKPOINTING = ("full", "selective", "off")
SHARE = 0.85
"""Share of the bandwidth that a large pointwise kernel reaches."""
COLUMNS = {"operation": -46, "forward GB": 12, "calls": 7, "backward GB": 13, "calls ": 7}


@dataclass
class Traffic:
    """By operation."""

    bytes: Counter[str]
    calls: Counter[str]

    def __sub__(self, other: "Traffic") -> "Traffic":
        bytes, calls = Counter(self.bytes), Counter(self.calls)
        bytes.subtract(other.bytes)
        calls.subtract(other.calls)
        return Traffic(bytes, calls)

    @property
    def pointwise(self) -> int:
        """Bytes that fusing could save."""
        return sum(count for name, count in self.bytes.items() if name not in PRODUCTS)


class Watch(TorchDispatchMode):
    """Counts the operations inside it."""

    def __init__(self):
        super().__init__()
        self.traffic = Traffic(Counter(), Counter())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in FREE and not name.startswith(("_unsafe_view", "_reshape_alias")):
            read = [each for index, each in enumerate(args) if index not in NOT_READ.get(name, ())]
            tensors = [each for each in tree_leaves((read, kwargs, output)) if isinstance(each, Tensor)]
            self.traffic.bytes[name] += sum(tensor.nbytes for tensor in tensors if tensor.device == META)
            self.traffic.calls[name] += 1
        return output


@contextlib.contextmanager
def fused_rms_norm() -> Iterator[None]:
    """RMSNorm as one operation, which it is on a GPU alone: layer norm's, which reads and writes the same, and a mean."""
    original = F.rms_norm

    def fused(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return F.layer_norm(x, shape, weight, None, eps or 1e-6)

    F.rms_norm = fused
    try:
        yield
    finally:
        F.rms_norm = original


def count(config: dict, checkpointing: str, side: int, text: int, rank: int) -> tuple[Traffic, Traffic]:
    """Forward and backward of the whole model, recomputation in the latter.

    Args:
        config: contents of `transformer/config.json`.
        checkpointing: `full`, `selective` or `off`.
    """
    with META:
        dit = build_dit(config).to(torch.bfloat16).requires_grad_(False)
    denoiser = Denoiser(dit, config["zero_cond_t"], Execution.of(checkpointing))
    with META:
        adapter = attach_lora(denoiser, rank, rank, DEFAULT_TARGETS)
        adapter.copy_for_products(dit.transformer_blocks, torch.bfloat16)
    latents = torch.empty(1, LATENT_CHANNELS, side // LATENT_CELL, side // LATENT_CELL, device=META)
    embeddings = torch.empty(1, text, config["joint_attention_dim"], device=META)
    condition = Condition(embeddings, torch.ones(1, text, dtype=torch.bool), [latents])
    with flash_attention(), fused_rms_norm():
        with Watch() as forward:
            velocity = denoiser(latents, torch.empty(1, device=META), condition)
        with Watch() as backward:
            velocity.square().mean().backward()
    return forward.traffic, backward.traffic


def of_a_block(config: dict, checkpointing: str, side: int, text: int, rank: int) -> tuple[Traffic, Traffic]:
    """What each further block adds."""
    few, more = (count(config | {"num_layers": n}, checkpointing, side, text, rank) for n in (2, 3))
    return more[0] - few[0], more[1] - few[1]


def main(options: argparse.Namespace) -> None:
    """Prints a block's operations, and a step's totals for each way of checkpointing."""
    config = (
        json.loads((SHIPPED / "transformer_config.json").read_text()) if options.tiny else REAL.config("transformer")
    )
    layers = options.layers or config["num_layers"]
    header = environment("cpu") | {"side": options.side, "text tokens": options.text, "rank": options.rank}
    report = Report(COLUMNS, options.json, header)
    parts = {kept: of_a_block(config, kept, options.side, options.text, options.rank) for kept in CHECKPOINTING}
    forward, backward = parts["off"]
    for name, _ in (forward.bytes + backward.bytes).most_common(options.top):
        report.add(f"{name} (product)" if name in PRODUCTS else name, row_of({name}, forward, backward))
    every = forward.bytes.keys() | backward.bytes.keys()
    report.add("all of a block", row_of(every, forward, backward))
    report.add("pointwise of a block", row_of(every - PRODUCTS, forward, backward))
    print(f"\na step of {layers} blocks, at {SHARE:.0%} of {options.gpu}'s bandwidth")
    for kept, traffic in parts.items():
        pointwise = layers * sum(part.pointwise for part in traffic)
        milliseconds = pointwise / (BANDWIDTH[options.gpu] * 1e12 * SHARE) * 1e3
        report.numbers["rows"][f"step, {kept}"] = {"pointwise TB": pointwise / 1e12, "pointwise ms": milliseconds}
        print(f"    {kept:10} {pointwise / 1e12:6.3g} TB pointwise, {milliseconds:.0f} ms")
    report.save()


def row_of(names: Set[str], forward: Traffic, backward: Traffic) -> dict[str, float]:
    """These operations together."""
    row = {}
    for part, traffic in {"forward": forward, "backward": backward}.items():
        row[f"{part} GB"] = sum(traffic.bytes[name] for name in names) / 1e9
        row["calls" if part == "forward" else "calls "] = sum(traffic.calls[name] for name in names)
    return row


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="Number of the transformer's blocks (default the model's 60).")
    parser.add_argument(
        "--side", type=int, default=1024, help="Side of target and reference, in pixels (default 1024)."
    )
    parser.add_argument("--text", type=int, default=250, help="Tokens of the instruction and the images (default 250).")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--gpu", choices=BANDWIDTH, default="H200", help="GPU whose memory bandwidth is assumed (default H200)."
    )
    parser.add_argument("--top", type=int, default=14, help="Number of operations to list (default 14).")
    parser.add_argument("--tiny", action="store_true", help="Use the tiny model's sizes.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to.")
    options = parser.parse_args()
    if options.tiny:
        options.side, options.text, options.rank = min(options.side, 64), min(options.text, 12), min(options.rank, 4)
    return options


if __name__ == "__main__":
    with exit_codes():
        main(parse_arguments())
