"""The configuration: plain dataclasses, composed from `configs/` by Hydra and checked once, here."""

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import hydra
import omegaconf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from data_prep.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MOVED = {
    "eval.inversion": "eval.qwen.inversion",
    "eval.samplers": "eval.qwen.samplers",
    "eval.validation": "eval.scores.validation",
    "train.loggers": "train.record.loggers",
    "train.wandb_logger": "train.record.wandb_logger",
}
"""Modules that a `_target_` may still name as they were called in older configurations, and where they are now."""
RENAMED = {
    "loss/lbm_main": "loss=lbm_main is called loss=lbm_mostly_source now, and weighs what it says: 0.95 of the source's stream "
    "and 0.05 of white's, where each weighed 1 before",
}
"""Files of `configs/` that had another name, and what to say of them."""
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
    """A folder or hub id in the layout of Qwen/Qwen-Image-Edit-2511."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen weights. LoRA weights are always float32."""
    weights: Literal["bf16", "fp8", "int8", "nf4"] = "bf16"
    """Format of the linear layers in the transformer's blocks: `bf16` keeps them in `model.dtype`, the others round them as
    they are read. docs/memory.md says what each saves and costs."""
    zero_cond_t: bool | None = None
    """References modulated with sigma 0. Read from the model; repeat it here only as a check."""


@dataclass
class DataConfig:
    """Rows and their geometry."""

    dataset: str | None = None
    """JSON, JSONL, CSV or Parquet file, or a Hugging Face dataset."""
    root: str | None = None
    """Folder that the rows' paths are relative to; the dataset file's own by default."""
    validation: str | None = None
    """Dataset of held-out rows; by default the rows of `dataset` whose split is `validation`."""
    max_pixels: int = 1024 * 1024
    """Largest area of a target."""
    vision_pixels: int = 384 * 384
    """Area at which Qwen2.5-VL sees an image."""
    reference_pixels: int | None = None
    """Largest area of a reference; `max_pixels` by default."""
    on_error: Literal["raise", "skip"] = "raise"
    """What an unusable row does: end the run, or be left out. Either way it is in run_dir/rejected.jsonl."""
    caption_dropout: float = 0.0
    """Probability that a sample is trained with an empty instruction, for classifier-free guidance."""

    def __post_init__(self):
        require(0 <= self.caption_dropout < 1, f"data.caption_dropout must lie in [0, 1), got {self.caption_dropout}")
        for name in ("max_pixels", "vision_pixels"):
            require(getattr(self, name) >= 32 * 32, f"data.{name} must be at least 1024, got {getattr(self, name)}")


@dataclass
class CacheConfig:
    """Phase 1."""

    dir: str = "${run_dir}/cache"
    """Where the cache is; runs may share one."""
    batch_size: int = 4
    """Images of one size per call of the VAE."""
    shard_size: int = 64
    """Records per file: the most work that a kill costs."""
    workers: int = 8
    """Threads that read images."""

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "workers"):
            require(getattr(self, name) >= 1, f"cache.{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class TrainConfig:
    """Phase 2."""

    num_steps: int = 1000
    """Optimizer steps."""
    micro_batch_size: int = 1
    """Samples per forward on one device."""
    grad_accum_steps: int | None = None
    """Micro-batches per optimizer step on one device; null: 1, or as many as `global_batch_size` asks for."""
    global_batch_size: int | None = None
    """Samples per optimizer step over all devices, in place of `grad_accum_steps`: the same training on any number of GPUs."""
    group_size: int | None = None
    """Samples of an optimizer step that are taken from one bucket together; by default a micro-batch, which must divide it. With
    the seed and the global batch it decides the order of records: name it to keep that order with smaller micro-batches."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    validate_every: int = 500
    """Steps between validations, each after a checkpoint; the untrained model and the last step are always validated."""
    log_every: int = 10
    """Steps between lines in the log, which also gets one a minute; metrics.jsonl has every step."""
    save_minutes: float = 20.0
    """The longest time between checkpoints, in minutes."""
    keep_last: int = 3
    """Checkpoints that stay whole, to continue from. Of older ones the best stays, and every `keep_every`-th, without what only
    continuing needs."""
    keep_every: int | None = None
    """Keep the adapter of every checkpoint whose step is a multiple of this."""
    best_by: str | None = "auto"
    """The validation's number that decides which checkpoint is best and stays, such as validation/steps_4/ssim. `auto`: PSNR at
    the most steps; null: none."""
    gradient_checkpointing: Literal["auto", "off", "selective", "full"] | int = "auto"
    """What the backward pass computes again: nothing (`off`), what is cheap (`selective`: the outputs of matrix products and
    attention are kept), or everything (`full`). A number of blocks: of the first so many everything but attention, the others
    selectively. `auto`: as little as the planned GPU's memory allows."""
    offload_blocks: Literal["auto"] | int = "auto"
    """Blocks of the transformer whose frozen weights wait in CPU memory and come to the GPU one block ahead. `auto`: as few as
    the planned GPU's memory needs; none on a CPU, and none under zero3."""
    attention: Literal["auto", "flash3"] = "auto"
    """Attention kernel. `auto`: PyTorch's choice for the device. `flash3`: FlashAttention-3, which must be installed."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the transformer's block with torch.compile. `auto`: on CUDA."""
    max_grad_norm: float | None = None
    """Clip the gradient's norm. Must stay null with Prodigy."""
    device: str | None = None
    """`cpu`; by default what accelerate finds: cuda if there is one, else cpu."""

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
    """LoRA."""

    rank: int = 64
    """Of each low-rank product."""
    alpha: float | None = None
    """Scale is alpha / rank; equal to the rank by default."""
    target_modules: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """Suffixes of the linear modules' names."""
    rank_pattern: dict[str, int] | None = None
    """Suffix of modules' names -> another rank for them, such as {img_mod.1: 8}; the longest suffix counts."""
    alpha_pattern: dict[str, float] | None = None
    """The same for alpha. Without it, and without `alpha`, every module's alpha is its own rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Learn magnitudes too. Only this project and PEFT load such a file."""
    init_from: str | None = None
    """An adapter whose weights a new run starts from, ours or another trainer's: a file, a checkpoint, a run or a hub id. Its
    rank may be smaller than `rank`; optimizer, data and objective are the run's own."""
    frozen: list[str] = field(default_factory=list)
    """Adapters that are added to the base model's weights and not trained, such as a step-distilled one. Edit with them too."""
    export_frozen: bool = False
    """Put the frozen adapters into the exported one, which then needs none beside it."""

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
        require(len(self.target_modules) > 0, "adapter.target_modules is empty: name at least one, such as to_q")


@dataclass
class ParallelConfig:
    """How training is spread over processes. Phase 1 takes any number of them under every strategy."""

    strategy: Literal["auto", "single", "ddp", "zero2", "zero3"] = "auto"
    """`single`: one process. `ddp`: a replica on each. `zero2`: gradients sharded too. `zero3`: frozen weights sharded
    (DeepSpeed ZeRO). `auto`: single on one process; on several ddp if the model fits into each GPU, else zero3."""
    offload: bool = False
    """zero3: frozen weights, LoRA masters and optimizer in CPU memory."""
    bucket_size: int = 500_000_000
    """ZeRO: elements that are reduced, gathered or prefetched together."""
    overlap_comm: bool = True
    """ZeRO: communicate while computing."""
    contiguous_gradients: bool = True
    """ZeRO: copy gradients into one buffer as they are produced."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """ZeRO: further keys of DeepSpeed's `zero_optimization`, `+parallel.zero_options.NAME=VALUE`."""

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
    """A name such as H100, RTX 4090 or 4090; by default the GPU that is here, or one of 96 GB."""
    world_size: int | None = None
    """Processes, one GPU each; by default those that were launched."""

    def __post_init__(self):
        require(
            self.world_size is None or self.world_size >= 1,
            f"plan.world_size must be at least 1, got {self.world_size}",
        )


@dataclass
class Config:
    """A run."""

    name: str = "run"
    """Of the run."""
    run_dir: str = "runs/${name}"
    """Everything that the run writes."""
    seed: int = 0
    """Of the order of records, and of every draw."""
    phases: list[Literal["plan", "cache", "train"]] = field(default_factory=lambda: ["cache", "train"])
    """What to do. `[plan]` only says what the run needs: memory, time, disk."""
    resume: str = "auto"
    """`auto`: from the newest checkpoint in run_dir; `never`: refuse a run_dir that has one; or a checkpoint's path."""
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
        for node in ("loss", "optim"):
            require("_target_" in getattr(self, node), f"{node} is not set: add {node}=NAME, see configs/{node}/")
        require(
            self.model.weights == "bf16" or not self.adapter.dora,
            f"adapter.dora=true needs the lengths of the full weights, which model.weights={self.model.weights} rounds: use "
            "model.weights=bf16",
        )
        prodigy = "Prodigy" in str(self.optim["_target_"])
        require(
            not (prodigy and self.train.max_grad_norm is not None),
            f"train.max_grad_norm={self.train.max_grad_norm} together with Prodigy: clipping hides from it the "
            "gradients that its step size is estimated from; set train.max_grad_norm=null",
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


def compose(overrides: list[str]) -> Config:
    """The configuration of `configs/config.yaml` with command-line overrides.

    Raises:
        InputError: an override is malformed, a key or group is unknown, or a value has the wrong type or range.
    """
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides=[as_given(override) for override in overrides])
        except (HydraException, omegaconf.errors.OmegaConfBaseException, ValueError) as error:
            raise InputError(_explain(error)) from error
        return from_hydra(composed)


def as_given(override: str) -> str:
    """An override whose value is quoted where it is meant as it stands: Hydra cannot read it, or would read a path as a list.

    Hydra's own syntax comes first: numbers, lists, sweeps, quotes. A path with a comma or in brackets must exist to be one.
    """
    key, equals, value = override.partition("=")
    if not equals:
        return override
    parser = OverridesParser.create()
    try:
        parsed = parser.parse_override(override)
        if isinstance(parsed.value(), str | int | float | None) or not os.path.exists(value):
            return override
    except HydraException:
        pass
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    try:
        parser.parse_override(quoted)
    except HydraException:  # its key is what is wrong, and Hydra says so
        return override
    return quoted


def from_hydra(composed: DictConfig) -> Config:
    """Checks a composed node and makes it a `Config`.

    Raises:
        InputError: as `compose`.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(_explain(error)) from error
    try:
        return _build(Config, _with_moved(values), "")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def to_yaml(config: Config) -> str:
    """The resolved configuration, as run_dir/config.yaml holds it."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def read_yaml(path: Path) -> dict[str, Any]:
    """What `to_yaml` wrote, with every `_target_` where it is now."""
    return _with_moved(OmegaConf.to_container(OmegaConf.load(path)))


def _with_moved(values: Any) -> Any:
    """The same values, with every `_target_` that names a module of `MOVED` by its place now."""
    if isinstance(values, list):
        return [_with_moved(value) for value in values]
    if not isinstance(values, dict):
        return values
    values = {key: _with_moved(value) for key, value in values.items()}
    module, dot, name = str(values.get("_target_", "")).rpartition(".")
    return values | {"_target_": f"{MOVED[module]}{dot}{name}"} if module in MOVED else values


def _build(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """Fills a dataclass from a mapping, refusing unknown keys and wrong types by their full key."""
    if not isinstance(values, Mapping):
        raise InputError(f"{prefix.rstrip('.')} must be a group of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise InputError(f"unknown key {prefix}{key}{_nearest(key, list(hints), prefix)}")
    arguments = {}
    for item in fields(kind):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if item.name not in values:
            continue
        value = values[item.name]
        arguments[item.name] = _build(hint, value, f"{key}.") if is_dataclass(hint) else _checked(value, hint, key)
    return kind(**arguments)


def _checked(value: Any, hint: Any, key: str) -> Any:
    """The value, if it has the hinted type; an int is taken where a float is asked for."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        if type(value) in options:
            return value
        if int in options and (words := [w for option in options for w in typing.get_args(option)]):
            if value not in words:
                raise InputError(f"{key} must be one of {', '.join(words)}, or a whole number, got {value!r}")
            return value
        if len(plain := [_TYPE_NAMES[option] for option in options if option in _TYPE_NAMES]) > 1:
            raise InputError(f"{key} must be {' or '.join(plain)}, got {value!r}")
        return _checked(value, next(option for option in options if option is not type(None)), key)
    if origin is Literal:
        if value not in options:
            raise InputError(f"{key} must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{key} must be a list such as [a,b], got {value!r}")
        return [_checked(item, options[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{key} must be a group of keys, got {value!r}")
        return dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{key} must be {_TYPE_NAMES[hint]}, got {value!r}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _nearest(name: str, valid: list[str], prefix: str = "") -> str:
    """`: did you mean …?`, or the valid names when none is near."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f": did you mean {prefix}{near[0]}?" if near else f": known here are {', '.join(valid)}"


def _explain(error: Exception) -> str:
    """One sentence for what Hydra says in several lines."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_override(match[1])
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        if match[1] in RENAMED:
            return RENAMED[match[1]]
        group, _, name = match[1].rpartition("/")
        return f"there is no configs/{group}/{name}.yaml{_nearest(name, _files(group), f'{group}=')}"
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"the configuration refers to {match[1]}, which does not exist"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _files(group: str) -> list[str]:
    """The names that a group of `configs/` has."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def _unknown_override(key: str) -> str:
    *path, last = key.split(".")
    kind: Any = Config
    for part in path:
        kind = typing.get_type_hints(kind).get(part) if is_dataclass(kind) else None
    if key == "exp":
        return f"an experiment is added with a plus sign: +exp=NAME, with one of {', '.join(_files('exp'))}"
    if (CONFIGS / key).is_dir():
        return f"{key}= takes a name: {', '.join(_files(key))}"
    if not is_dataclass(kind):
        return f"unknown key {key}: add it with +{key}=… if the group's class takes it"
    if last in {item.name for item in fields(kind)}:
        return f"{key} takes its keys one by one: +{key}.NAME=VALUE"
    return f"unknown key {key}{_nearest(last, [item.name for item in fields(kind)], ''.join(f'{p}.' for p in path))}"
