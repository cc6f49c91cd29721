"""The plan against what it predicts: real tensors, real states, real files, and PyTorch's own counters."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data_prep.cache.sizes import (
    Bucket,
    DatasetSizes,
    RowSize,
    cache_bytes,
    estimated_sizes,
    estimated_tokens,
    image_size,
)
from data_prep.errors import InputError
from data_prep.model.directory import ModelDirectory
from data_prep.model.geometry import Geometry, Size
from data_prep.rows.augmentation import Augment
from data_prep.rows.mixture import DatasetSource, read_mixture
from data_prep.rows.rows import Row, read_rows
from losses.batch import Condition
from scripts.gpu_smoke import REAL
from tests.caching import cached
from tests.train.plan.planning import MEGAPIXEL, build_optimizer, configure, resolved
from train.config import DEFAULT_TARGETS, compose
from train.model.adapter import attach_lokr, attach_lora
from train.model.denoiser import Denoiser, build_dit, load_denoiser
from train.model.execution import Execution
from train.model.extra.extras import attach_extras
from train.optim import AdamW, Prodigy
from train.plan.gpus import GPUS, find_gpu
from train.plan.memory import LiveBytes, LoraSizes, Transformer, flash_attention, optimizer_bytes
from train.plan.plan import GIB, Plan, dataset_sizes, make_plan
from train.record.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

SMALL = REAL.config("transformer") | {
    "num_layers": 12,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
LONG = "leave everything in this picture exactly as it was before, down to the smallest of its details"
PRESERVED = ["loss.preserve=0.5", f"data.preserve_prompts=['Keep it.','{LONG}']"]
LORA = LoraSizes(8, tuple(DEFAULT_TARGETS))
BUCKETS = [
    Bucket(Size(256, 256), (Size(256, 256),), 40, 1.0),
    Bucket(Size(512, 320), (Size(256, 256), Size(320, 128)), 150, 1.0),
]


def plan_real(model: ModelDirectory, gpu: str, *overrides: str, world_size: int = 1) -> Plan:
    return make_plan(configure(*overrides), model, MEGAPIXEL, world_size, find_gpu(gpu), build_optimizer)


def test_counts_the_published_model(real_model):
    plan = plan_real(real_model, "H100")
    assert round(plan.num_parameters / 1e9, 2) == 20.43
    assert plan.num_modules == 723 - 3  # of the last block's text path, whose output nothing reads
    assert plan.fits
    assert plan.advice == []
    assert 36 < plan.memory.gpu["frozen weights"] / GIB < 39
    assert 16 < plan.cache_phase.total / GIB < 24
    assert plan.buckets[0].length == 2 * 4096 + 250


def test_is_a_screen_of_text(real_model):
    text = plan_real(real_model, "RTX 4090", "parallel=zero3", "train.micro_batch_size=4", world_size=4).render()
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 130
    assert "DOES NOT FIT" in text


def test_ranks_share_what_zero_shares(planner):
    def total(strategy: str, world_size: int) -> float:
        chosen = [f"parallel={strategy}", "train.gradient_checkpointing=full", "train.offload_blocks=0"]
        config = resolved(planner, "H100", *chosen, world_size=world_size)
        return planner.training(config, world_size, find_gpu("H100")).total / GIB

    assert total("ddp", 2) == total("ddp", 8)
    shared = 38 + 1.83  # the blocks; and DeepSpeed's parts of LoRA and of what is around the blocks
    assert total("zero3", 2) - total("zero3", 8) == pytest.approx(shared * (1 / 2 - 1 / 8), rel=0.01)
    assert total("zero3_offload", 2) < total("zero3", 8) < total("zero2", 8)


def test_a_bridge_trains_a_third_less_where_few_inputs_are_seen(planner):
    """`img_mod` and `txt_mod`, 35 % of the weights of one rank everywhere, at rank 8 instead of 64."""
    everywhere, eight = planner.num_lora(configure()), {"img_mod.1": 8, "txt_mod.1": 8}
    for name, pattern in {"lbm_2511": eight, "sft_2511": None, "sft_2509": None}.items():
        assert compose([f"+exp={name}", "data.dataset=rows.json"]).adapter.rank_pattern == pattern
    same = compose(["+exp=lbm_2511", "data.dataset=rows.json", "adapter.rank_pattern=null"])
    assert same.adapter == compose(["+exp=lbm_2511", "data.dataset=rows.json", "adapter=lora"]).adapter
    slim = planner.num_lora(configure("adapter=lora_slim"))
    assert slim == pytest.approx(everywhere * (1 - 0.35 * (1 - 8 / 64)), rel=0.01)
    assert planner.num_lora(configure("adapter=lora_slim", "adapter.target_modules=[to_q]")) == 60 * 64 * 2 * 3072
    assert planner.num_lora(configure("adapter=lokr")) < everywhere / 7


@pytest.mark.parametrize(
    ("gpu", "world_size", "overrides", "strategy"),
    [
        ("H100", 1, [], "single"),
        ("A100 40GB", 1, [], "single"),
        ("H100", 2, [], "ddp"),
        ("A100 40GB", 4, [], "zero3"),
        ("A100 40GB", 4, ["adapter.dora=true"], "ddp"),
        ("RTX 4090", 8, [], "zero3"),
        ("RTX 4090", 8, ["model.weights=int8"], "ddp"),
        ("RTX 4090", 8, ["train.offload_blocks=50"], "ddp"),
        ("H100", 2, ["parallel=zero2"], "zero2"),
    ],
)
def test_auto_shares_out_only_what_does_not_fit(planner, gpu, world_size, overrides, strategy):
    chosen = [] if overrides[:1] == ["parallel=zero2"] else ["parallel=auto"]
    config = configure(*chosen, *overrides)
    assert planner.decide(config, world_size, find_gpu(gpu))["parallel.strategy"] == strategy


def test_one_gpu_and_eight_train_the_same_batch(real_model):
    plans = {n: plan_real(real_model, "H100", "parallel=ddp", world_size=n) for n in (2, 8)}
    assert {n: plan.samples_per_step for n, plan in plans.items()} == {2: 8, 8: 2}
    assert "global batch 16 = 1 sample x 8 accumulated x 2 GPUs" in plans[2].render()
    assert "global batch 16 = 1 sample x 2 accumulated x 8 GPUs" in plans[8].render()
    with pytest.raises(InputError, match=r"global_batch_size=16 is not a multiple of .* 1 x 3 = 3: choose a multiple"):
        plan_real(real_model, "H100", "parallel=ddp", world_size=3)


def test_auto_keeps_as_much_as_fits(planner):
    """Each setting needs less than the one before it, and `auto` is the first that fits."""

    def planned(setting: str | int, gpu: str = "H100", micro_batch_size: int = 1):
        overrides = [f"train.gradient_checkpointing={setting}", f"train.micro_batch_size={micro_batch_size}"]
        config = resolved(planner, gpu, *overrides, "train.offload_blocks=0")
        return config.train.gradient_checkpointing, planner.training(config, 1, find_gpu(gpu)).total

    totals = [planned(setting)[1] for setting in ("off", "selective", 1, 20, 40, 60, "full")]
    assert totals == sorted({*totals}, reverse=True)
    assert planned("auto", "H200")[0] == "off"
    setting, needed = planned("auto", "A100 40GB")
    assert (setting, needed > find_gpu("A100 40GB").memory_gib * GIB) == ("full", True)
    chosen, needed = planned("auto", micro_batch_size=2)
    assert isinstance(chosen, int)
    available = find_gpu("H100").memory_gib * GIB
    assert needed <= available < planned(chosen - 1 or "selective", micro_batch_size=2)[1]


def executed(setting: str | int) -> Execution:
    return Execution.of(setting)


def run_small(setting: str | int, bucket: Bucket, device: str, num_layers: int, batch_size: int = 2):
    """A forward and backward pass; returns what is to be called."""
    with torch.device(device):
        dit = build_dit(SMALL | {"num_layers": num_layers}).to(torch.bfloat16).requires_grad_(False)
    denoiser = Denoiser(dit, True, executed(setting))
    adapter = attach_lora(denoiser, LORA.rank, LORA.rank, LORA.target_modules)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grids = [torch.zeros(batch_size, 16, *size.latent, device=device) for size in (bucket.target, *bucket.references)]
    text = torch.zeros(batch_size, bucket.text_tokens, SMALL["joint_attention_dim"], device=device)
    mask = torch.ones(batch_size, bucket.text_tokens, dtype=torch.bool, device="cpu" if device == "meta" else device)
    condition = Condition(text, mask, grids[1:])
    return denoiser, lambda: denoiser(grids[0], torch.ones(batch_size, device=device), condition).square().mean()


@pytest.mark.parametrize("bucket", BUCKETS)
def test_activations_are_what_autograd_saves(bucket):
    """Kept blocks: the sum of the distinct tensors that a real forward pass in bf16 saves, weights left out."""
    denoiser, forward = run_small("off", bucket, "cpu", SMALL["num_layers"])
    weights = {parameter.untyped_storage().data_ptr() for parameter in denoiser.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    measured = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in weights)
    loss.backward()
    predicted = Transformer(SMALL, torch.bfloat16, True).activation_bytes(bucket, 2, executed("off"), LORA)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("setting", ["off", "selective", 2, "full"])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_activations_are_the_peak_of_a_real_run(bucket, setting):
    """All layers with real numbers on the CPU, with PyTorch's own choice of attention."""
    _, forward = run_small(setting, bucket, "cpu", SMALL["num_layers"])
    with LiveBytes() as live:
        forward().backward()
    predicted = Transformer(SMALL, torch.bfloat16, True).activation_bytes(bucket, 2, executed(setting), LORA)
    assert predicted == pytest.approx(live.peak, rel=0.1)  # CPU kernels differ


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("setting", ["off", "selective", 2, "full"])
def test_activations_are_the_peak_of_a_gpu(setting):
    bucket = Bucket(Size(1024, 1024), (Size(1024, 1024),), 200, 1.0)
    _, forward = run_small(setting, bucket, "cuda", SMALL["num_layers"])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward().backward()
    predicted = Transformer(SMALL, torch.bfloat16, True).activation_bytes(bucket, 2, executed(setting), LORA)
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


@pytest.mark.parametrize("setting", ["off", "selective", 2, "full"])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_counts_the_operations_of_the_real_code(bucket, setting):
    transformer = Transformer(SMALL, torch.bfloat16, True)
    _, forward = run_small(setting, bucket, "meta", SMALL["num_layers"], batch_size=1)
    with flash_attention(), FlopCounterMode(display=False) as counter:
        loss = forward()
        assert sum(transformer.forward_flops(bucket, LORA)) == pytest.approx(counter.get_total_flops(), rel=0.02)
        loss.backward()
    assert transformer.flops(bucket, LORA, executed(setting)).total == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


@pytest.mark.parametrize("dora", [False, True])
def test_lora_shapes_are_those_of_the_adapter(tiny_model_dir, dora):
    model = ModelDirectory(tiny_model_dir)
    adapter = attach_lora(load_denoiser(model), 4, 4, DEFAULT_TARGETS, dora=dora)
    shapes = Transformer(model.config("transformer"), torch.bfloat16, True).lora_shapes(
        LoraSizes(4, tuple(DEFAULT_TARGETS), dora)
    )
    assert list(shapes) == list(adapter.layers)
    assert [s for group in shapes.values() for s in group] == [tuple(p.shape) for p in adapter.parameters()]


@pytest.mark.parametrize("sizes", [(64, False, -1), (4, False, 4), (2, True, 8)])
def test_lokr_is_counted_as_it_is_made(tiny_model_dir, sizes):
    rank, *shape = sizes
    model, pattern = ModelDirectory(tiny_model_dir), {"img_mod.1": 1}
    adapter = attach_lokr(load_denoiser(model), rank, rank, DEFAULT_TARGETS, *shape, rank_pattern=pattern)
    transformer = Transformer(model.config("transformer"), torch.bfloat16, True)
    lora = LoraSizes(rank, tuple(DEFAULT_TARGETS), rank_pattern=tuple(pattern.items()), lokr=tuple(shape))
    shapes = transformer.lora_shapes(lora)
    assert list(shapes) == list(adapter.layers)
    assert [s for group in shapes.values() for s in group] == [tuple(p.shape) for p in adapter.parameters()]
    starts = {group[-1] for group in shapes.values()}
    assert starts == {tuple(p.shape) for p in adapter.parameters() if not p.any()}
    assert transformer.forward_flops(BUCKETS[0], lora)[1] > 0


@pytest.mark.parametrize("build", [AdamW, Prodigy])
def test_optimizer_state_and_checkpoint_have_the_predicted_size(tiny_model_dir, tmp_path, build):
    """Of LoRA, of modules in full and of an added one, which the plan knows by their sizes."""
    model, in_full = ModelDirectory(tiny_model_dir), ("norm_out", "proj_out", "norm_q")
    nodes = {"ste": {"_target_": "train.model.extra.SpatialTemporalEncoder", "hidden": 32}}
    denoiser = load_denoiser(model, train_modules=in_full)
    adapter = attach_lora(denoiser, 16, 16, DEFAULT_TARGETS, train_modules=in_full)
    adapter.extras = attach_extras(denoiser, in_full, nodes)
    optimizer = build(adapter.parameters())
    for parameter in adapter.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(0)
    tensors = [t for state in optimizer.torch_optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    lora = LoraSizes(16, tuple(DEFAULT_TARGETS), train_modules=in_full, modules=json.dumps(nodes))
    transformer = Transformer(model.config("transformer"), torch.bfloat16, True)
    extra, shapes = transformer.extra_shapes(lora), transformer.lora_shapes(lora)
    assert extra == {name: tuple(each.shape) for name, each in adapter.extras.parameters.items()}
    predicted = optimizer_bytes([shape for some in shapes.values() for shape in some], build, [*extra.values()])
    assert predicted == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=1e-3)
    around, inside = transformer.replaced_bytes("bf16", lora)
    in_model = sum(each.numel() for name, each in adapter.extras.parameters.items() if "ste." not in name)
    assert around + inside == 2 * in_model

    folder = Checkpoints(tmp_path, 1, {}, "", torch.bfloat16).save(1, adapter, optimizer, {})
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    num_trainable = sum(parameter.numel() for parameter in adapter.parameters())
    assert predicted + num_trainable * (2 + 4) == pytest.approx(on_disk, rel=0.1)  # and headers


def test_a_finished_cache_tells_the_true_lengths(tiny_cache, tiny_pairs, tiny_model_dir):
    config = compose(
        [
            "+exp=tiny_lbm",
            f"model.path={tiny_model_dir}",
            f"data.dataset={tiny_pairs}/train.json",
            f"cache.dir={tiny_cache}",
        ]
    )
    sizes, records = (
        dataset_sizes(config, ModelDirectory(tiny_model_dir)),
        cached(tiny_cache, tiny_pairs / "train.json"),
    )
    assert sorted(row.text_tokens for row in sizes.rows) == sorted(len(record.prompt_emb) for record in records)
    plan = make_plan(config, ModelDirectory(tiny_model_dir), sizes, 1, find_gpu("H100"), build_optimizer)
    stored = (
        tensor for record in records for tensor in (record.target_latents, *record.edit_latents, record.prompt_emb)
    )
    assert plan.cache_bytes == pytest.approx(sum(tensor.nbytes for tensor in stored), rel=0.1)  # texts: the longest
    assert plan.fits
    assert "tokens" in plan.render()

    estimated = estimated_sizes(read_rows(tiny_pairs / "train.json"), records.header.geometry)
    buckets = [[(b.target, b.references) for b in s.buckets(records.header.geometry)] for s in (sizes, estimated)]
    assert buckets[0] == buckets[1]


def test_reads_sizes_upright_and_skips_what_is_unusable(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.png"):
        Image.new("RGB", (64, 96)).save(tmp_path / name, exif=exif)
        assert image_size(tmp_path / name) == Size(64, 96)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    rows = [
        {"prompt": "turn", "image": "turned.jpg", "edit_image": ["turned.png", "turned.jpg"]},
        {"prompt": "turn", "image": "broken.jpg", "edit_image": "turned.png"},
        {"prompt": "turn", "image": "missing.jpg", "edit_image": "turned.png"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    geometry = Geometry(96 * 64)
    sizes = estimated_sizes(read_rows(tmp_path / "rows.json"), geometry)
    [bucket] = sizes.buckets(geometry)
    assert (bucket.target, bucket.references) == (Size(64, 96), (Size(64, 96),) * 2)
    assert "1 of 3 rows" in sizes.origin
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(InputError, match="none of the images of 2 rows"):
        estimated_sizes(read_rows(tmp_path / "rows.json"), geometry)


@pytest.mark.parametrize(
    ("resolutions", "augment"),
    [({64 * 64: 1.0, 128 * 128: 3.0}, Augment()), ({}, Augment(1, crop=0.5)), ({}, Augment(3, crop=0.5))],
    ids=["two areas", "one copy", "three copies"],
)
def test_a_sample_of_many_rows_has_all_versions_alike(resolutions, augment, tmp_path):
    """However many rows there are: an even step would meet the same version of each."""
    Image.new("RGB", (128, 128)).save(tmp_path / "p.png")
    (tmp_path / "rows.json").write_text(
        json.dumps([{"prompt": "turn", "image": "p.png", "edit_image": "p.png"}] * 1000)
    )
    source = DatasetSource(str(tmp_path / "rows.json"), resolutions=resolutions)
    rows = [row for row in read_mixture([source], augment) if isinstance(row, Row)]
    sizes = estimated_sizes(rows, Geometry(64 * 64))
    assert 200 < len(sizes.rows) <= 500

    def shares(seen: Iterable[Row | RowSize]) -> dict[object, float]:
        """Of the draws, by area and by whether there is a crop."""
        found: dict[object, float] = defaultdict(float)
        for row in seen:
            whole = row.augmentation is None if isinstance(row, Row) else row.target == Size(128, 128)
            found[row.max_pixels, whole] += row.weight
        return {key: weight / sum(found.values()) for key, weight in found.items()}

    assert shares(sizes.rows) == pytest.approx(shares(rows), abs=0.02)  # a crop may be of nearly all


def test_instructions_that_are_preserved_are_as_long_as_they_are(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    rows = [{"prompt": "turn it around", "image": "p.png", "edit_image": "p.png"}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["+exp=tiny_lbm", f"data.dataset={tmp_path}/rows.json", f"cache.dir={tmp_path}/none"]
    plain, kept = (dataset_sizes(compose([*words, *more]), REAL).rows for more in ((), PRESERVED))
    more = estimated_tokens(LONG) - estimated_tokens("turn it around")
    assert [row.text_tokens for row in kept] == [plain[0].text_tokens + more, plain[1].text_tokens], "they take turns"


@pytest.mark.parametrize(
    ("references", "images"), [((), 1), ((64,), 2), ((64, 64), 3), ((32,), 2.25), ((32, 64), 2.25)]
)
def test_a_record_has_each_picture_once(references, images):
    """A source of another size than its target is there at the target's too, and text to image has none."""
    row = RowSize(Size(64, 64), tuple(Size(side, side) for side in references), 10)
    assert cache_bytes(DatasetSizes((row,), 3, "a test"), Geometry(64 * 64), 100) == 3 * 2 * (
        images * 16 * 64 + 10 * 100
    )


def test_text_to_image_has_no_source_to_encode(planner):
    row, config, encoders = RowSize(Size(64, 64), (), 10), configure(), planner.encoders
    alone = copy(planner)
    alone._buckets = DatasetSizes((row,), 1, "a test").buckets
    assert alone.caching_flops(config) == 64 * 64 * encoders.flops_per_pixel + encoders.text_flops(10)


def test_text_length_of_the_published_tokenizer():
    """211 tokens for a short instruction and one square image: what upstream's pipeline gives."""
    from data_prep.cache import sizes

    vision = round(384 / 28) ** 2
    assert vision + sizes.TOKENS_PER_IMAGE + sizes.TOKENS_PER_ROW == pytest.approx(211, abs=5)


def test_gpus_by_name():
    assert [find_gpu(gpu.name).memory_gib for gpu in GPUS] == [gpu.memory_gib for gpu in GPUS]
    for name, found in {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-40GB": "A100 40GB",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000",
        "4090": "RTX 4090",
        "h20": "H20",
    }.items():
        assert find_gpu(name).name == found
    assert [find_gpu(number).name for number in (4090, 5090, 3090)] == ["RTX 4090", "RTX 5090", "RTX 3090"]
    with pytest.raises(InputError, match="did you mean 'RTX 4090'"):
        find_gpu("RTX 4O90")
    if not torch.cuda.is_available():
        assert "assumed" in find_gpu().origin
    assert all(math.isfinite(gpu.memory_gib) for gpu in GPUS)


def test_plans_without_files_of_weights(real_model):
    assert not list(Path(real_model.path).rglob("*.safetensors"))
    assert (
        plan_real(real_model, "H200", "loss.combine=sum").flops_per_step
        == 2 * plan_real(real_model, "H200").flops_per_step
    )


def test_a_plan_counts_places_that_stay_empty_and_first_forwards(real_model):
    """23 rows in two buckets, in groups of 8 and in steps of 16: 4 groups with 9 empty places, two steps an epoch. A rollout of
    half of the 45 % of samples with sigma < 1 adds that share of forwards."""
    large, small = (RowSize(Size(side, side), (Size(side, side),), 250) for side in (1024, 512))
    data = DatasetSizes((large,) * 3 + (small,) * 20, 23, "a test")
    one = ["train.global_batch_size=16", "train.micro_batch_size=8", "train.gradient_checkpointing=full"]

    def plan(*overrides: str) -> Plan:
        return make_plan(configure(*one, *overrides), real_model, data, 2, find_gpu("H200"), build_optimizer)

    plain, rolled = plan(), plan("loss.rollout=0.5")
    assert plain.empty_share == pytest.approx(9 / 32)
    line = "an epoch   2 steps, in groups of 8 from one bucket; 28.1% of the places stay empty"
    assert line in plain.render()
    transformer = Transformer(real_model.config("transformer"), torch.bfloat16, True)
    lora = LoraSizes(64, tuple(DEFAULT_TARGETS))
    forward = sum(each.share * sum(transformer.forward_flops(each, lora)) for each in plain.buckets)
    added = rolled.flops_per_step - plain.flops_per_step
    assert added == pytest.approx(0.5 * 0.45 * forward * 8 * 23 / 32, rel=1e-6)
    single = plan("train.micro_batch_size=1")
    assert single.empty_share == 0
    assert single.flops_per_step == pytest.approx(plain.flops_per_step * 32 / 23, rel=1e-6)
