"""What a training step needs, found before anything is loaded: the real code runs on the meta device, and is watched.

A meta tensor has a shape and no numbers. The real denoiser with real LoRA layers therefore runs forward and backward in a
fraction of a second, and what autograd keeps alive is measured instead of modelled.
"""

import contextlib
import functools
import io
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from data_prep.cache.sizes import Bucket, num_tokens
from data_prep.model.encoders import LATENT_CHANNELS
from losses.batch import Condition, Scene
from train.model.adapter import Adapter, attach_lokr, attach_lora, by_suffix, match_modules
from train.model.adapter_reader import ends_in, linear_modules
from train.model.block import UNUSED_IN_LAST_BLOCK
from train.model.denoiser import Denoiser, build_dit
from train.model.execution import Execution, Keep
from train.model.extra.extras import ADDED, attach_extras
from train.model.extra.modules import build_module
from train.model.extra.whole import trained_parameters
from train.model.layers.lokr import lokr_products, lokr_shapes
from train.model.offload import aligned
from train.optim import Optimizer
from train.plan.quantised import Format, Layer

META = torch.device("meta")
MEASURED_NUMBERS = 2**16
"""How many numbers of a parameter that is not LoRA are given to the optimizer to find out what it keeps."""
Shape = tuple[int, ...]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make inside it, until nothing refers to them any more.

    `now` are alive, `peak` were at once. What existed before, such as weights, does not count. A kernel's own workspace
    is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), True)
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return output

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Attention as a GPU computes it, which keeps no matrix of all pairs; on the meta device PyTorch would make one."""
    original = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@dataclass(frozen=True)
class LoraSizes:
    """What decides how large the adapter is."""

    rank: int
    target_modules: tuple[str, ...]
    dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """Suffix of modules' names, and another rank for them."""
    lokr: tuple[bool, int] | None = None
    """`decompose_both` and `decompose_factor` of LoKr; None for LoRA."""
    train_modules: tuple[str, ...] = ()
    """Trained in full instead."""
    modules: str = "{}"
    """The added modules, as JSON."""

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """`_target_` and arguments of the added modules, by name."""
        return json.loads(self.modules)

    def attach(self, denoiser: Denoiser) -> Adapter:
        """An adapter of this size, with what of the pattern and of `train_modules` is for layers that the denoiser has."""
        there, linear = [name for name, _ in denoiser.dit.named_modules()], linear_modules(denoiser.dit)
        in_full = [suffix for suffix in self.train_modules if any(ends_in(name, suffix) for name in there)]
        ranks = {suffix: rank for suffix, rank in self.rank_pattern if any(ends_in(name, suffix) for name in linear)}
        sizes = denoiser, self.rank, None, self.target_modules
        options: dict[str, Any] = {"rank_pattern": ranks, "train_modules": in_full}
        adapter = (
            attach_lokr(*sizes, *self.lokr, **options) if self.lokr else attach_lora(*sizes, dora=self.dora, **options)
        )
        adapter.extras = attach_extras(denoiser, in_full, self.nodes)
        return adapter


class Flops(NamedTuple):
    """Operations of a forward and backward pass."""

    frozen: int
    """Products with frozen weights."""
    rest: int
    """LoRA and attention."""
    forward: int
    """The operations of the forward pass, of both kinds."""

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.frozen + self.rest


class Transformer:
    """The transformer of a model directory: shapes and no numbers.

    Args:
        config: contents of `transformer/config.json`.
        dtype: data type of the frozen weights.
        zero_cond_t: whether references have their own modulation.

    Attributes:
        num_parameters: frozen ones.
    """

    def __init__(self, config: dict, dtype: torch.dtype, zero_cond_t: bool):
        self.config, self.dtype, self.zero_cond_t = config, dtype, zero_cond_t
        with META:
            self.dit = build_dit(config)
        self.num_layers = len(self.dit.transformer_blocks)
        self.linear = {name: m for name, m in self.dit.named_modules() if isinstance(m, nn.Linear)}
        self.num_parameters = sum(parameter.numel() for parameter in self.dit.parameters())
        self._small = functools.cache(self._small)
        self._peak, self.lora_shapes = functools.cache(self._peak), functools.cache(self.lora_shapes)
        self.extra_shapes = functools.cache(self.extra_shapes)
        self.ranks = functools.cache(self.ranks)
        self.layers, self.frozen_bytes = functools.cache(self.layers), functools.cache(self.frozen_bytes)

    def block_bytes(self, weights: str) -> int:
        """Bytes of one block's frozen weights in this format (`model.weights`), each tensor aligned."""
        kept, sizes = Format(weights, False, False, self.dtype.itemsize), []
        for module in self.dit.transformer_blocks[0].modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.Linear):
                del own["weight"]
                sizes.append(kept.stored_bytes(Layer(module.in_features, module.out_features, 0)))
            sizes += [parameter.numel() * self.dtype.itemsize for parameter in own.values()]
        return sum(map(aligned, sizes))

    def frozen_bytes(self, weights: str) -> int:
        """Bytes of all frozen weights, the blocks' in this format."""
        around = self.num_parameters - sum(p.numel() for p in self.dit.transformer_blocks.parameters())
        return around * self.dtype.itemsize + self.num_layers * self.block_bytes(weights)

    def layers(self, bucket: Bucket) -> list[Layer]:
        """The blocks' linear layers, and how many tokens of one sample each is given."""
        return [
            Layer(linear.in_features, linear.out_features, self._tokens(name, bucket))
            for name, linear in self.linear.items()
            if name.startswith("transformer_blocks.")
        ]

    def ranks(self, lora: LoraSizes) -> dict[str, int]:
        """Module -> rank.

        Raises:
            InputError: a target matches no linear module.
        """
        names = match_modules(self.dit, lora.target_modules, lora.train_modules)
        return by_suffix(names, dict(lora.rank_pattern), lora.rank, "adapter.rank_pattern", self.linear)

    def lora_shapes(self, lora: LoraSizes) -> dict[str, list[Shape]]:
        """Module -> the shapes of its A, B and, with DoRA, magnitudes; or of LoKr's matrices, the last of which starts at zero.

        Raises:
            InputError: a target matches no linear module.
        """
        shapes: dict[str, list[Shape]] = {}
        for name, rank in self.ranks(lora).items():
            linear = self.linear[name]
            if lora.lokr:
                shapes[name] = [*lokr_shapes(linear.out_features, linear.in_features, rank, *lora.lokr).values()]
                continue
            shapes[name] = [(rank, linear.in_features), (linear.out_features, rank)]
            if lora.dora:
                shapes[name].append((linear.out_features,))
        return shapes

    def extra_shapes(self, lora: LoraSizes) -> dict[str, Shape]:
        """The parameters that are trained beside LoRA, by name.

        Raises:
            InputError: a name matches no module, or an added module cannot be built.
        """
        shapes = {}
        for name in trained_parameters(self.dit, lora.train_modules):
            shapes[name] = tuple(self.dit.get_parameter(name).shape)
        for name, node in lora.nodes.items():
            with META:
                module = build_module(f"adapter.modules.{name}", node, self.dit.img_in.out_features)
            shapes |= {f"{ADDED}{name}.{own}": tuple(each.shape) for own, each in module.named_parameters()}
        return shapes

    def replaced_bytes(self, weights: str, lora: LoraSizes) -> tuple[int, int]:
        """Bytes of the frozen weights around and in the blocks that are trained in full instead, and not kept twice."""
        kept, around, inside = Format(weights, False, False, self.dtype.itemsize), 0, 0
        for name in trained_parameters(self.dit, lora.train_modules):
            linear, shape = self.linear.get(name.removesuffix(".weight")), self.dit.get_parameter(name).shape
            if not name.startswith("transformer_blocks."):
                around += shape.numel() * self.dtype.itemsize
            elif linear:
                inside += kept.stored_bytes(Layer(linear.in_features, linear.out_features, 0))
            else:
                inside += shape.numel() * self.dtype.itemsize
        return around, inside

    def activation_bytes(self, bucket: Bucket, batch_size: int, execution: Execution, lora: LoraSizes) -> int:
        """The peak of a forward and backward pass beyond weights and gradients, for one batch of this bucket.

        Blocks are alike but for the last one, so two small models tell what each further block adds. Where the first blocks
        keep less than the others, the peak is either at them, when what the others kept is gone, or before.
        """
        kept = execution.kept(self.num_layers)
        peaks: dict[Keep, tuple[int, int]] = {keep: self._peak(bucket, batch_size, keep, lora) for keep in kept}
        total = sum(peaks[keep][1] for keep in kept)
        first = [peaks[keep][1] for keep in kept if keep == kept[0]]
        return max(peaks[kept[-1]][0] + total, peaks[kept[0]][0] + sum(first))

    def _peak(self, bucket: Bucket, batch_size: int, keep: Keep, lora: LoraSizes) -> tuple[int, int]:
        """What does not depend on the number of blocks, and what each adds."""
        few, more = (self._dry_run(n, bucket, batch_size, keep, lora).peak for n in (2, 3))
        return few - 2 * (more - few), more - few

    def _small(self, num_layers: int, lora: LoraSizes) -> Denoiser:
        """As in a run, where gradients accumulate, with so many blocks."""
        with META:
            dit = build_dit(self.config | {"num_layers": num_layers}).to(self.dtype).requires_grad_(False)
            denoiser = Denoiser(dit, self.zero_cond_t)
            adapter = lora.attach(denoiser)
        adapter.copy_for_products(dit.transformer_blocks, self.dtype)
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return denoiser

    def _dry_run(self, num_layers: int, bucket: Bucket, batch_size: int, keep: Keep, lora: LoraSizes) -> LiveBytes:
        denoiser = self._small(num_layers, lora)
        Execution(keep).apply(denoiser.dit.transformer_blocks)
        latents, *references = (
            torch.empty(batch_size, LATENT_CHANNELS, *size.latent, device=META)
            for size in (bucket.target, *bucket.references)
        )
        text = torch.empty(batch_size, bucket.text_tokens, self.config["joint_attention_dim"], device=META)
        mask = torch.ones(batch_size, bucket.text_tokens, dtype=torch.bool)
        condition = Condition(text, mask, references, Scene(latents, latents, latents[:, :1]))
        with flash_attention(), LiveBytes() as live:
            velocity = denoiser(latents, torch.empty(batch_size, device=META), condition)
            velocity.square().mean().backward()
        return live

    def flops(self, bucket: Bucket, lora: LoraSizes, execution: Execution) -> "Flops":
        """Operations of a forward and backward pass of one sample.

        A product of m x k and k x n costs 2mkn. Backward, a frozen layer needs its input's gradient only, LoRA its
        weights' too, and flash attention computes five products for the forward's two.
        """
        frozen, adapter, attention = self.forward_flops(bucket, lora)
        again = self.recomputed(execution)
        attended = execution.kept(self.num_layers).count("nothing") * attention // self.num_layers
        rest = (3 + again) * adapter + attention * 7 // 2 + attended
        return Flops(round((2 + again) * frozen), round(rest), frozen + adapter + attention)

    def recomputed(self, execution: Execution) -> float:
        """The share of the blocks whose products are computed again."""
        kept = execution.kept(self.num_layers)
        return (kept.count("attention") + kept.count("nothing")) / self.num_layers

    def forward_flops(self, bucket: Bucket, lora: LoraSizes) -> tuple[int, int, int]:
        """Operations of one sample: frozen linear layers, LoRA, attention."""
        last = f"transformer_blocks.{self.num_layers - 1}."
        used = {n for n in self.linear if not (n.startswith(last) and n.removeprefix(last) in UNUSED_IN_LAST_BLOCK)}
        frozen = sum(2 * self.linear[name].weight.numel() * self._tokens(name, bucket) for name in used)
        adapter = sum(
            2 * self._adapter_products(name, lora) * self._tokens(name, bucket) for name in self.lora_shapes(lora)
        )
        width = self.dit.img_in.out_features
        queries = (self.num_layers - 1) * bucket.length + num_tokens(
            bucket.target
        )  # the last block: of the output alone
        return frozen, adapter, 4 * queries * bucket.length * width

    def _adapter_products(self, name: str, lora: LoraSizes) -> int:
        """Multiplications of a module's adapter for one token."""
        if not lora.lokr:
            return sum(math.prod(shape) for shape in self.lora_shapes(lora)[name][:2])
        linear = self.linear[name]
        return lokr_products(linear.out_features, linear.in_features, self.ranks(lora)[name], *lora.lokr)

    def _tokens(self, name: str, bucket: Bucket) -> int:
        """How many rows a linear layer is given for one sample."""
        if "img_mod" in name or "timestep_embedder" in name:
            return 2 if self.zero_cond_t else 1
        if "txt_mod" in name or "norm_out" in name:
            return 1
        if any(part in name for part in ("txt_", "add_")):
            return bucket.text_tokens
        last = name.startswith(f"transformer_blocks.{self.num_layers - 1}.") and not name.endswith(("to_k", "to_v"))
        return num_tokens(bucket.target) if last or name == "proj_out" else bucket.image_tokens


def optimizer_bytes(
    shapes: Sequence[Shape],
    build: Callable[[list[nn.Parameter]], Optimizer],
    extra: Sequence[Shape] = (),
    zero: set[Shape] | None = None,
) -> int:
    """The size of the optimizer's state, from one real step on one LoRA parameter of each shape.

    Args:
        shapes: shapes of all parameters of LoRA or LoKr.
        extra: shapes of all others; of a large one some rows are measured.
        zero: of those of `shapes` that start at zero, which some optimizers make use of; by default LoRA's B, which are taller
            than wide.
    """
    beside = sum(count * _state_bytes(shape, build) for shape, count in Counter(extra).items())
    counts = Counter(shapes)
    if zero is None:
        zero = {shape for shape in counts if len(shape) == 2 and shape[0] > shape[1]}
    parameters = {s: nn.Parameter(torch.zeros(s) if s in zero else torch.ones(s)) for s in counts}
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy announces itself
        optimizer = build(list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step(0)
    state = optimizer.torch_optimizer.state
    return beside + sum(
        count * sum(tensor.nbytes for tensor in _tensors(dict(state[parameters[shape]])))
        for shape, count in counts.items()
    )


def _state_bytes(shape: Shape, build: Callable[[list[nn.Parameter]], Optimizer]) -> int:
    """Of one parameter that does not begin at zero."""
    numbers = math.prod(shape)
    rows = min(shape[0], max(1, MEASURED_NUMBERS * shape[0] // numbers))
    parameter = nn.Parameter(torch.ones(rows, *shape[1:]))
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = build([parameter])
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step(0)
    state = _tensors(dict(optimizer.torch_optimizer.state[parameter]))
    return sum(tensor.nbytes for tensor in state) * shape[0] // rows
