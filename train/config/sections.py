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
    """The base model: a folder, or a hub id, in the layout of Qwen/Qwen-Image-Edit-2511."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen weights. LoRA weights are always float32."""
    weights: Literal["bf16", "fp8", "int8", "nf4"] = "bf16"
    """Format of the linear layers in the transformer's blocks: `bf16` keeps them in `model.dtype`, the others round them as they
    are read. docs/memory.md says what each saves and costs."""
    zero_cond_t: bool | None = None
    """Whether reference tokens are modulated as if sigma were 0. It is read from the model; set it only to check that."""


@dataclass
class DatasetConfig:
    """One of several datasets that are trained on together."""

    dataset: str = ""
    """The dataset: a JSON, JSONL, CSV or Parquet file, or a Hugging Face dataset."""
    root: str | None = None
    """The folder that its paths are relative to; by default `data.root`, or the dataset file's own folder."""
    weight: float | None = None
    """What all rows of this dataset together count, in proportion to the other datasets' weights, whatever their sizes. All
    datasets have a weight, or none."""
    repeats: float = 1.0
    """How often each row of this dataset counts, where no dataset has a weight."""
    resolutions: dict[int, float] = field(default_factory=dict)
    """The areas at which its rows are cached, in pixels of the largest target, and the share of the draws of each, such as
    {1048576: 0.7, 262144: 0.3}; by default `data.max_pixels` alone."""

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
            f"data.dataset: {name} has weight={self.weight} and repeats={self.repeats}, which both say how often it is drawn: "
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
    """Number of further versions of each training row, which are cached and drawn beside it. All versions of a row together
    are drawn as often as a row without any."""
    flip: bool = True
    """Mirror the first version, the third and so on, unless the instruction names sides, turns or writing (in English or
    Chinese). Pictures with writing in them are mirrored too."""
    crop: float = 1.0
    """Smallest share of each side that a version keeps of source, target and mask, in (0, 1]; 1 for no crops. With a mask all
    of the edit is kept."""

    def __post_init__(self):
        require(self.copies >= 0, f"data.augment.copies must be 0 or more, got {self.copies}")
        require(0 < self.crop <= 1, f"data.augment.crop must lie in (0, 1], got {self.crop}")
        require(
            self.crop < 1 or self.copies <= int(self.flip),
            f"data.augment.copies={self.copies} asks for more versions than there are without crops, which is "
            f"{'one, the mirrored one' if self.flip else 'none'}: set data.augment.crop=0.9, or fewer copies",
        )


@dataclass
class DataConfig:
    """Rows and their geometry."""

    dataset: str | list[str | DatasetConfig] | None = None
    """The dataset: a JSON, JSONL, CSV or Parquet file, or a Hugging Face dataset; or a list of datasets that are trained on
    together, each by its name or with the keys of `data.dataset[]`."""
    root: str | None = None
    """The folder that paths in the dataset are relative to; by default the dataset file's own folder."""
    validation: str | None = None
    """The dataset of held-out rows; by default the rows of `dataset` whose split is `validation`."""
    max_pixels: int = 1024 * 1024
    """Largest area of a target image, in pixels."""
    vision_pixels: int = 384 * 384
    """Area at which the text encoder (Qwen2.5-VL) sees an image, in pixels."""
    reference_pixels: int | None = None
    """Largest area of a reference image, in pixels; `max_pixels` by default."""
    on_error: Literal["raise", "skip"] = "raise"
    """What happens to a row that cannot be used: `raise` ends the run, `skip` leaves the row out. Either way it is listed in
    run_dir/rejected.jsonl."""
    caption_dropout: float = 0.0
    """Probability that a sample is trained with an empty instruction, for classifier-free guidance."""
    preserve_prompts: list[str] = field(default_factory=list)
    """Instructions for which `loss.preserve` keeps what the base model does; each row has one of them, in turn. By default the
    empty one."""
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
    """The folder of the cache. All runs share it: what one has encoded, no other encodes again."""
    batch_size: int = 4
    """Number of images of one size that the VAE encodes together, and on a GPU of instructions of one length."""
    shard_size: int = 64
    """Records per file, which is the most work that is lost when caching is killed."""
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
    """Number of micro-batches per optimizer step on one device; null means 1, or as many as `global_batch_size` asks for."""
    global_batch_size: int | None = None
    """Number of samples per optimizer step over all devices. It takes the place of `grad_accum_steps`, and makes the training the
    same on any number of GPUs."""
    group_size: int | None = None
    """Number of samples of an optimizer step that are taken from one bucket together; by default a micro-batch, which must divide
    it. With the seed and the global batch it decides the order of records: name it to keep that order with smaller
    micro-batches."""
    save_every: int = 500
    """Number of steps between checkpoints. The last step is always saved."""
    validate_every: int = 500
    """Number of steps between validations. The untrained model and the last step are always validated."""
    log_every: int = 10
    """Number of steps between lines on the terminal, which also gets one a minute. metrics.jsonl has every step."""
    save_minutes: float = 20.0
    """Longest time between checkpoints, in minutes."""
    keep_last: int = 3
    """Number of checkpoints that stay whole, to continue from. Of older ones the best stays, and every `keep_every`-th, without
    what only continuing needs."""
    keep_every: int | None = None
    """Keep the adapter of every checkpoint whose step is a multiple of this."""
    best_by: str | None = "auto"
    """The validation's number that decides which checkpoint is best and stays, such as validation/steps_4/ssim. `auto`: PSNR at
    the most steps; null: none."""
    gradient_checkpointing: Literal["auto", "off", "selective", "full"] | int = "auto"
    """What the backward pass computes again to save memory: nothing (`off`), what is cheap (`selective`: the outputs of matrix
    products and attention are kept), or everything (`full`). A number of blocks: of the first so many everything but
    attention, the others selectively. `auto`: as little as the planned GPU's memory allows."""
    offload_blocks: Literal["auto"] | int = "auto"
    """Number of blocks of the transformer whose frozen weights wait in CPU memory and come to the GPU one block ahead. `auto`: as
    few as the planned GPU's memory needs; none on a CPU, and none under zero3."""
    attention: Literal["auto", "flash3"] = "auto"
    """Attention kernel: `auto` is PyTorch's choice for the device; `flash3` is FlashAttention-3, which must be installed."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the transformer's block is compiled with torch.compile; `auto` compiles it on CUDA."""
    max_grad_norm: float | None = None
    """Largest norm of the gradient, which is clipped to it. It must stay null with Prodigy."""
    device: str | None = None
    """`cpu` to train without a GPU; by default accelerate chooses: cuda if there is one, else cpu."""

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name == "offload_blocks" else 1
            if type(value) is int:
                require(value >= least, f"train.{item.name} must be at least {least}, got {value}")
        require(
            self.attention == "auto" or self.gradient_checkpointing in ("off", "full"),
            f"train.attention={self.attention} needs train.gradient_checkpointing=off or full, got "
            f"{self.gradient_checkpointing}: its output cannot be kept by itself",
        )
        require(
            self.grad_accum_steps is None or self.global_batch_size is None,
            f"train.grad_accum_steps={self.grad_accum_steps} and train.global_batch_size={self.global_batch_size} both say "
            "how many forwards make a step: set one of them to null",
        )
        require(self.save_minutes > 0, f"train.save_minutes must be positive, got {self.save_minutes}")
        require(self.device in (None, "cpu"), f"train.device must be cpu or null (what there is), got {self.device!r}")
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
                f"train.global_batch_size={self.global_batch_size} is no multiple of train.micro_batch_size x processes = "
                f"{self.micro_batch_size} x {world_size} = {at_once}: choose a multiple, or another number of processes"
            )
        return self.global_batch_size // at_once


@dataclass
class AdapterConfig:
    """LoRA or LoKr."""

    kind: Literal["lora", "lokr"] = "lora"
    """What is trained of each layer: `lora`, a product of two matrices of a small rank, or `lokr`, a Kronecker product of two
    smaller ones. ComfyUI and this project load both, diffusers only LoRA. Choose with adapter=lora or adapter=lokr."""
    rank: int = 64
    """Rank of LoRA. Of LoKr it is that of its second factor, which is whole if this is at least half its longer side."""
    alpha: float | None = None
    """LoRA is scaled by alpha / rank, the same in all layers; by default alpha is the rank, and the scale 1."""
    target_modules: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """The linear layers that get LoRA, by the end of their names."""
    rank_pattern: dict[str, int] | None = None
    """Other ranks for some layers, by the end of their names, such as {img_mod.1: 8}; the longest end counts. They hold
    whatever `rank` is, also where they are larger."""
    alpha_pattern: dict[str, float] | None = None
    """Other values of alpha for some layers, by the end of their names; they are divided by the layer's own rank. By default a
    layer of another rank has the scale of all others."""
    rslora: bool = False
    """Scale LoRA by alpha / sqrt(rank) (rsLoRA)."""
    dora: bool = False
    """Also learn the magnitude of each output channel (DoRA). Only this project and PEFT load such a file."""
    decompose_both: bool = False
    """LoKr's first factor is a product of two matrices too, if the rank is below half its longer side."""
    decompose_factor: int = -1
    """Shorter side of LoKr's first factor, where it divides that of the layer: the smaller it is, the more is trained. -1 makes
    the two factors of about equal size."""
    init_from: str | None = None
    """An adapter whose weights a new run starts from, ours or another trainer's: a file, a checkpoint, a run or a hub id. Its
    rank may be smaller than `rank`; optimizer, data and objective are the run's own."""
    frozen: list[str] = field(default_factory=list)
    """Adapters that are added to the base model's weights and not trained, such as a step-distilled one. Edit with them too."""
    export_frozen: bool = False
    """Put the frozen adapters into the exported one, which then needs none beside it."""
    train_modules: list[str] = field(default_factory=list)
    """Modules of the transformer that are trained in full instead of with LoRA, by the end of their names, such as norm_out."""
    modules: dict[str, Any] | None = None
    """Modules that are added and trained beside LoRA: name -> `_target_`, a subclass of train.model.extra.ExtraModule, and its
    arguments."""

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
            "adapter.export_frozen=true adds adapters up, which a DoRA adapter cannot: leave it out, or set adapter.dora=false",
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
                lokr or value in (False, -1), f"adapter.{name}={value} is LoKr's: use adapter=lokr, or leave it out"
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
    """How the work is spread. `single`: one process. `ddp`: a replica on each. `zero2`: gradients sharded too. `zero3`: frozen
    weights sharded (DeepSpeed ZeRO). `auto`: single on one process; on several ddp if the model fits into each GPU, else
    zero3."""
    offload: bool = False
    """Whether zero3 keeps frozen weights, LoRA weights and the optimizer in CPU memory."""
    bucket_size: int = 500_000_000
    """Number of elements that ZeRO reduces, gathers or prefetches together."""
    overlap_comm: bool = True
    """Whether ZeRO communicates while it computes."""
    contiguous_gradients: bool = True
    """Whether ZeRO copies gradients into one buffer as they are produced."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization`: +parallel.zero_options.NAME=VALUE."""

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
        """Of ZeRO; 0 without it."""
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
    """The GPU to plan for, such as H100, RTX 4090 or 4090; by default the one that is here, or one of 96 GB."""
    world_size: int | None = None
    """Number of processes to plan for, with one GPU each; by default as many as were launched."""

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
    """The folder for everything that the run writes."""
    seed: int = 0
    """Random seed for the order of records and for every draw."""
    phases: list[Literal["plan", "cache", "train"]] = field(default_factory=lambda: ["cache", "train"])
    """What to do. `[plan]` only says what the run needs: memory, time and disk space."""
    resume: str = "auto"
    """What to continue from: `auto` takes the newest checkpoint in run_dir, `never` refuses a run_dir that has one; or the path
    of a checkpoint."""
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
            "data.preserve_prompts is what loss.preserve keeps, which is 0: set it too, for example loss.preserve=0.25",
        )
        require(
            not (self.adapter.train_modules and self.loss.get("preserve")),
            "loss.preserve asks the base model, whose own weights adapter.train_modules changes: leave one of them out",
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
