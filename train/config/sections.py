"""What a configuration holds: plain dataclasses, each checked when it is made."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from data_prep.errors import InputError

DEFAULT_TARGETS = [
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1", "img_in", "txt_in", "proj_out"),
]


def require(holds: bool, message: str) -> None:
    """Raises `ValueError(message)` unless the condition holds."""
    if not holds:
        raise ValueError(message)


@dataclass
class ModelConfig:
    """The base model."""

    path: str = "???"
    """Base model: a folder or a hub id in the layout of Qwen/Qwen-Image-Edit-2511."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen weights. LoRA weights are always float32."""
    weights: Literal["bf16", "fp8", "int8", "nf4"] = "bf16"
    """Format of the frozen linear weights in the transformer's blocks: `bf16` keeps them in `model.dtype`, the others quantise
    them when they are loaded. docs/memory.md says what each saves and costs."""
    zero_cond_t: bool | None = None
    """Whether reference tokens are modulated with sigma = 0. It is read from the model; set it only to check the value."""


@dataclass
class DatasetConfig:
    """One of several datasets that are trained on together."""

    dataset: str = ""
    """Dataset: a JSON, JSONL, CSV or Parquet file, or a Hugging Face dataset."""
    root: str | None = None
    """Folder that the paths in this dataset are relative to. By default it is `data.root`, or the folder of the dataset file."""
    weight: float | None = None
    """How often this dataset is drawn from, in proportion to the weights of the other datasets and whatever their sizes. Give
    every dataset a weight, or none."""
    repeats: float = 1.0
    """How often each row of this dataset is drawn, relative to rows with 1. It is used if no dataset has a weight."""
    resolutions: dict[int, float] = field(default_factory=dict)
    """Resolutions to cache the rows at: the largest area of a target in pixels, and the share of the draws, such as
    {1048576: 0.7, 262144: 0.3}. By default it is `data.max_pixels` alone."""

    def __post_init__(self):
        name = self.dataset
        require(bool(name), "a dataset of the list data.dataset has no file: add dataset=FILE to it")
        for key in ("weight", "repeats"):
            value = getattr(self, key)
            require(
                value is None or 0 < value < math.inf, f"data.dataset: {key} of {name} must be above 0, got {value}"
            )
        require(
            self.weight is None or self.repeats == 1,
            f"data.dataset: {name} has weight={self.weight} and repeats={self.repeats}, which both set how often it is drawn: "
            "leave one out",
        )
        for area, share in self.resolutions.items():
            require(
                type(area) is int and area >= 32 * 32,
                f"data.dataset: the areas in resolutions of {name} must be whole numbers of at least 1024 pixels, got {area}",
            )
            require(
                type(share) in (int, float) and 0 < share < math.inf,
                f"data.dataset: the share of {area} pixels in resolutions of {name} must be above 0, got {share!r}",
            )


@dataclass
class AugmentConfig:
    """Further versions of each training row, made when it is cached."""

    copies: int = 0
    """Number of augmented versions of each training row, cached in addition to the row itself. A row and its versions together
    are drawn as often as a row without augmentation."""
    flip: bool = True
    """Mirror every other version, beginning with the first, unless the instruction mentions sides, turns or writing in English
    or Chinese. Images that contain writing are mirrored too, so turn this off for them."""
    crop: float = 1.0
    """Smallest share of each side that a random crop keeps, in (0, 1]. 1 means no crops. If a row has a mask, the crop contains
    the whole edit."""

    def __post_init__(self):
        require(self.copies >= 0, f"data.augment.copies must be 0 or more, got {self.copies}")
        require(0 < self.crop <= 1, f"data.augment.crop must lie in (0, 1], got {self.crop}")
        require(
            self.crop < 1 or self.copies <= int(self.flip),
            f"data.augment.copies={self.copies} is more than the number of versions without crops, which is "
            f"{'one, the mirrored one' if self.flip else 'none'}: set data.augment.crop=0.9, or fewer copies",
        )


@dataclass
class DataConfig:
    """Rows and their geometry."""

    dataset: str | list[str | DatasetConfig] | None = None
    """Dataset: a JSON, JSONL, CSV or Parquet file, or a Hugging Face dataset. A list trains on several datasets together, each
    given by its name or with the keys of `data.dataset[]`."""
    root: str | None = None
    """Folder that the paths in the dataset are relative to. By default it is the folder of the dataset file."""
    validation: str | None = None
    """Dataset of held-out rows for validation. By default they are the rows of `data.dataset` with split=validation."""
    max_pixels: int = 1024 * 1024
    """Largest area of a target image, in pixels."""
    vision_pixels: int = 384 * 384
    """Area at which the text encoder (Qwen2.5-VL) sees an image, in pixels."""
    reference_pixels: int | None = None
    """Largest area of a reference image, in pixels. By default it is `data.max_pixels`."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about a row that cannot be used: `raise` ends the run, `skip` leaves the row out. Both list it in
    run_dir/rejected.jsonl."""
    caption_dropout: float = 0.0
    """Probability that a sample is trained with an empty instruction, for classifier-free guidance."""
    preserve_prompts: list[str] = field(default_factory=list)
    """Instructions for which `loss.preserve` keeps the base model's behaviour. They are assigned to the rows in turn. By default
    there is one, the empty instruction."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        if isinstance(self.dataset, list):
            require(len(self.dataset) > 0, "data.dataset is an empty list: name at least one dataset")
            weights = [each.weight for each in self.datasets]
            require(
                None not in weights or not any(weights),
                "data.dataset gives some datasets a weight and others none: give every one a weight, or use repeats",
            )
        require(0 <= self.caption_dropout < 1, f"data.caption_dropout must lie in [0, 1), got {self.caption_dropout}")
        for name in ("max_pixels", "vision_pixels"):
            require(getattr(self, name) >= 32 * 32, f"data.{name} must be at least 1024, got {getattr(self, name)}")

    @property
    def datasets(self) -> list[DatasetConfig]:
        """All of them, each with its own keys and its folder."""
        given = self.dataset if isinstance(self.dataset, list) else [self.dataset or ""]
        each = [one if isinstance(one, DatasetConfig) else DatasetConfig(one) for one in given]
        return [replace(one, root=one.root or self.root) for one in each]


@dataclass
class CacheConfig:
    """Phase 1."""

    dir: str = "cache"
    """Folder of the cache. All runs may share it, so that nothing is encoded twice."""
    batch_size: int = 4
    """Number of images of one size that the VAE encodes together. On a GPU it is also the number of instructions of one length
    that the text encoder encodes together."""
    shard_size: int = 64
    """Number of records per file. At most this many are lost when caching is killed."""
    workers: int = 8
    """Number of threads that read images."""

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "workers"):
            require(getattr(self, name) >= 1, f"cache.{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class TrainConfig:
    """Phase 2."""

    num_steps: int = 1000
    """Number of optimizer steps."""
    micro_batch_size: int = 1
    """Number of samples per forward pass on one device."""
    grad_accum_steps: int | None = None
    """Number of micro-batches per optimizer step on one device. By default it is 1, or follows from `global_batch_size`."""
    global_batch_size: int | None = None
    """Number of samples per optimizer step over all devices. Set it instead of `grad_accum_steps` to train the same on any number
    of GPUs."""
    group_size: int | None = None
    """Number of consecutive samples that come from one bucket, a multiple of `micro_batch_size`. By default it is equal to that.
    The order of records depends on it, so set it to keep the order when you reduce `micro_batch_size`."""
    save_every: int = 500
    """Number of steps between checkpoints. The last step is always saved."""
    validate_every: int = 500
    """Number of steps between validations. The untrained model and the last step are always validated."""
    log_every: int = 10
    """Number of steps between lines on the terminal. There is also one every minute. metrics.jsonl has every step."""
    save_minutes: float = 20.0
    """Longest time between checkpoints, in minutes."""
    keep_last: int = 3
    """Number of newest checkpoints to keep complete, so that training can resume from them. Older checkpoints are deleted, except
    for the adapters of the best one and of those that `keep_every` keeps."""
    keep_every: int | None = None
    """Keep the adapter of every checkpoint whose step is a multiple of this."""
    best_by: str | None = "auto"
    """Validation number that decides which checkpoint is the best, such as validation/steps_4/ssim. `auto` is the PSNR at the
    largest number of sampling steps. null keeps no best checkpoint."""
    gradient_checkpointing: Literal["auto", "off", "selective", "full"] | int = "auto"
    """What the backward pass recomputes to save memory. `off`: nothing. `selective`: everything but matrix products and
    attention. `full`: everything. A number N: everything but attention in the first N blocks, and selectively in the others.
    `auto`: as little as the GPU's memory allows."""
    offload_blocks: Literal["auto"] | int = "auto"
    """Number of transformer blocks whose frozen weights are kept in CPU memory and copied to the GPU one block ahead. `auto`: as
    few as the GPU's memory requires, and none on a CPU or with zero3."""
    attention: Literal["auto", "flash3"] = "auto"
    """Attention kernel. `auto`: PyTorch's choice for the device. `flash3`: FlashAttention-3, which must be installed."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to compile the transformer's block with torch.compile. `auto`: only on CUDA."""
    max_grad_norm: float | None = None
    """Largest gradient norm, for gradient clipping. It must stay null with Prodigy."""
    device: str | None = None
    """Device to train on. Set it to `cpu` to train without a GPU. By default accelerate chooses cuda if there is one."""

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name == "offload_blocks" else 1
            if type(value) is int:
                require(value >= least, f"train.{item.name} must be at least {least}, got {value}")
        require(
            self.attention == "auto" or self.gradient_checkpointing in ("off", "full"),
            f"train.attention={self.attention} needs train.gradient_checkpointing=off or full, got "
            f"{self.gradient_checkpointing}: its output cannot be kept separately",
        )
        require(
            self.grad_accum_steps is None or self.global_batch_size is None,
            f"train.grad_accum_steps={self.grad_accum_steps} and train.global_batch_size={self.global_batch_size} both set "
            "the number of forward passes per step: set one of them to null",
        )
        require(self.save_minutes > 0, f"train.save_minutes must be positive, got {self.save_minutes}")
        require(self.device in (None, "cpu"), f"train.device must be cpu or null (automatic), got {self.device!r}")
        if self.max_grad_norm is not None:
            require(self.max_grad_norm > 0, f"train.max_grad_norm must be positive, got {self.max_grad_norm}")

    def accumulation(self, world_size: int) -> int:
        """Forwards per optimizer step on each of this many devices.

        Raises:
            InputError: `global_batch_size` is no multiple of what the devices take at once.
        """
        if self.global_batch_size is None:
            return self.grad_accum_steps or 1
        at_once = self.micro_batch_size * world_size
        if self.global_batch_size % at_once:
            raise InputError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of train.micro_batch_size x processes = "
                f"{self.micro_batch_size} x {world_size} = {at_once}: choose a multiple, or another number of processes"
            )
        return self.global_batch_size // at_once


@dataclass
class AdapterConfig:
    """LoRA or LoKr."""

    kind: Literal["lora", "lokr"] = "lora"
    """Kind of adapter: `lora` (a product of two low-rank matrices per layer) or `lokr` (a Kronecker product of two smaller
    matrices). ComfyUI and this project load both, diffusers only LoRA. Choose it with adapter=lora or adapter=lokr."""
    rank: int = 64
    """Rank of the LoRA. For LoKr it is the rank of the second factor, which is a full matrix if the rank is at least half its
    longer side."""
    alpha: float | None = None
    """Alpha of the LoRA, which is scaled by alpha / rank in all layers. By default alpha is the rank, so the scale is 1."""
    target_modules: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """Linear layers that get a LoRA, given by the end of their names."""
    rank_pattern: dict[str, int] | None = None
    """Ranks for some layers that replace `rank`, by the end of the layers' names, such as {img_mod.1: 8}. If several ends match,
    the longest counts."""
    alpha_pattern: dict[str, float] | None = None
    """Values of alpha for some layers, by the end of the layers' names. They are divided by the layer's own rank. By default a
    layer with another rank has the same scale as all others."""
    rslora: bool = False
    """Scale LoRA by alpha / sqrt(rank) (rsLoRA)."""
    dora: bool = False
    """Also train the magnitude of each output channel (DoRA). Only this project and PEFT load the file as it is;
    eval/export.py convert writes it for diffusers and ComfyUI."""
    decompose_both: bool = False
    """Also make LoKr's first factor a product of two matrices if the rank is below half its longer side."""
    decompose_factor: int = -1
    """Shorter side of LoKr's first factor, if it divides the layer's side. A smaller value trains more weights. -1 makes the two
    factors about the same size."""
    init_from: str | None = None
    """Adapter whose weights a new run starts from: a file, a checkpoint, a run or a hub id, also from another trainer. Its rank
    may be smaller than `adapter.rank`. Optimizer, data and objective are the new run's own."""
    frozen: list[str] = field(default_factory=list)
    """Adapters that are added to the base model's weights and not trained, such as a step-distilled LoRA. Use them for editing
    too."""
    export_frozen: bool = False
    """Merge the frozen adapters into the exported adapter, so that it can be used without them."""
    train_modules: list[str] = field(default_factory=list)
    """Modules of the transformer to train in full instead of with LoRA, given by the end of their names, such as norm_out."""
    modules: dict[str, Any] | None = None
    """Modules to add to the transformer and train beside LoRA. Each has a name, a `_target_` (a subclass of
    train.model.extra.ExtraModule) and its arguments."""

    def __post_init__(self):
        require(self.rank >= 1, f"adapter.rank must be positive, got {self.rank}")
        require(self.alpha is None or self.alpha > 0, f"adapter.alpha must be positive, got {self.alpha}")
        for name, kinds in ("rank_pattern", (int,)), ("alpha_pattern", (int, float)):
            for suffix, value in (getattr(self, name) or {}).items():
                require(
                    type(value) in kinds and value > 0,
                    f"adapter.{name}: the value of {suffix} must be a positive {'whole ' * (name == 'rank_pattern')}number, "
                    f"got {value!r}",
                )
        require(
            not (self.dora and self.export_frozen),
            "adapter.export_frozen=true adds adapters up, which does not work with DoRA: leave it out, or set adapter.dora=false",
        )
        lokr = self.kind == "lokr"
        for name, reason in {
            "dora": "whose magnitudes are LoRA's",
            "rslora": "whose scale is LoRA's",
            "export_frozen": "which adds LoRA adapters up",
        }.items():
            require(
                not (lokr and getattr(self, name)),
                f"adapter.{name}=true, {reason}, does not go with adapter.kind=lokr: set it to false, or use adapter=lora",
            )
        for name in ("decompose_both", "decompose_factor"):
            value = getattr(self, name)
            require(
                lokr or value in (False, -1),
                f"adapter.{name}={value} is for LoKr only: use adapter=lokr, or leave it out",
            )
        require(
            self.decompose_factor == -1 or self.decompose_factor >= 2,
            f"adapter.decompose_factor must be 2 or more, or -1 for factors of equal size, got {self.decompose_factor}",
        )
        require(len(self.target_modules) > 0, "adapter.target_modules is empty: name at least one, such as to_q")
        for name, node in (self.modules or {}).items():
            require(
                str(name).isidentifier() and isinstance(node, dict) and "_target_" in node,
                f"adapter.modules: {name} must be a name without dots and spaces, with the _target_ of a module, such as "
                "{ste: {_target_: train.model.extra.SpatialTemporalEncoder}}",
            )


@dataclass
class ParallelConfig:
    """How training is spread over processes. Phase 1 takes any number of them under every strategy."""

    strategy: Literal["auto", "single", "ddp", "zero2", "zero3"] = "auto"
    """How training is spread over processes. `single`: one process. `ddp`: a full model on each GPU. `zero2`: the same
    with sharded gradients. `zero3`: the frozen weights are sharded too (DeepSpeed ZeRO). `auto`: single for one process,
    otherwise ddp if the model fits into each GPU, else zero3."""
    offload: bool = False
    """Keep the frozen weights, the LoRA weights and the optimizer in CPU memory with zero3."""
    bucket_size: int = 500_000_000
    """Number of elements that ZeRO reduces, gathers or prefetches at once."""
    overlap_comm: bool = True
    """Let ZeRO communicate while it computes."""
    contiguous_gradients: bool = True
    """Let ZeRO copy gradients into one buffer as they are produced."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """Other keys of DeepSpeed's `zero_optimization`, given as +parallel.zero_options.NAME=VALUE."""

    def __post_init__(self):
        require(self.bucket_size >= 1, f"parallel.bucket_size must be at least 1, got {self.bucket_size}")
        require(
            not self.offload or self.strategy == "zero3",
            f"parallel.offload=true needs parallel.strategy=zero3, got {self.strategy}: use parallel=zero3_offload",
        )
        decided = sorted({"stage", "offload_param", "offload_optimizer"} & self.zero_options.keys())
        require(not decided, f"parallel.zero_options has {', '.join(decided)}, which parallel=NAME decides")

    @property
    def stage(self) -> int:
        """Stage of ZeRO; 0 without ZeRO."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    def cuts_blocks(self, world_size: int) -> bool:
        """Whether a rank lacks weights that it multiplies by: on one process `zero3` trains as `single`."""
        return self.stage == 3 and (world_size > 1 or self.offload)

    @property
    def name(self) -> str:
        """As on the command line: `parallel=NAME`."""
        return self.strategy + ("_offload" if self.offload else "")


@dataclass
class PlanConfig:
    """What to plan for, when it is not this machine."""

    gpu: str | int | None = None
    """GPU to plan for, such as H100, RTX 4090 or 4090. By default it is this machine's GPU, or one of 96 GB."""
    world_size: int | None = None
    """Number of processes to plan for, with one GPU each. By default it is the number of processes that were launched."""

    def __post_init__(self):
        require(
            self.world_size is None or self.world_size >= 1,
            f"plan.world_size must be at least 1, got {self.world_size}",
        )


@dataclass
class Config:
    """A run."""

    name: str = "run"
    """Name of the run."""
    run_dir: str = "runs/${name}"
    """Folder for everything that the run writes."""
    seed: int = 0
    """Random seed for the order of the records, the noise and everything else that is random."""
    phases: list[Literal["plan", "cache", "train"]] = field(default_factory=lambda: ["cache", "train"])
    """Phases to run. `[plan]` only reports the memory, time and disk space that the run needs."""
    resume: str = "auto"
    """Checkpoint to resume from: `auto` for the newest in run_dir, or a checkpoint's path. `never` refuses a run_dir that has
    checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of the loss."""
    optim: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of the optimizer."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Name -> `_target_` and arguments of a logger; metrics.jsonl is always written."""
    validate: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of the validation; empty for none."""

    def __post_init__(self):
        require(
            self.model.path != "???", "model.path is not set: choose a model with model=tiny, or set model.path=FOLDER"
        )
        require(len(self.phases) > 0, "phases is empty: use [cache,train], [cache], [train] or [plan]")
        require(self.data.dataset is not None, "data.dataset is not set: add data.dataset=FILE (and data.root=FOLDER)")
        require(
            not self.data.preserve_prompts or bool(self.loss.get("preserve")),
            "data.preserve_prompts is only used with loss.preserve, which is 0: set it too, for example loss.preserve=0.25",
        )
        require(
            not (self.adapter.train_modules and self.loss.get("preserve")),
            "loss.preserve needs the base model's own weights, which adapter.train_modules changes: leave one of them out",
        )
        for node in ("loss", "optim"):
            require("_target_" in getattr(self, node), f"{node} is not set: add {node}=NAME, see configs/{node}/")
        require(
            self.model.weights == "bf16" or not self.adapter.dora,
            f"adapter.dora=true needs the lengths of the full weights, which model.weights={self.model.weights} rounds: use "
            "model.weights=bf16",
        )


def check_whole_blocks(config: Config, world_size: int) -> None:
    """Refuses what needs whole blocks on every rank where they are cut; on one process `zero3` trains as `single`.

    Raises:
        InputError: names both settings.
    """
    if not config.parallel.cuts_blocks(world_size):
        return
    needs = {
        "adapter.dora=true": config.adapter.dora,
        f"model.weights={config.model.weights}": config.model.weights != "bf16",
        f"train.offload_blocks={config.train.offload_blocks}": config.train.offload_blocks not in ("auto", 0),
    }
    for setting in [name for name, given in needs.items() if given]:
        raise InputError(
            f"{setting} needs whole blocks on every rank, which parallel={config.parallel.name} cuts: use parallel=single, "
            "ddp or zero2"
        )
