"""Every experiment composes, and what is wrong is named by its full key."""

from dataclasses import asdict
from importlib import import_module

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from tests.commands import ROOT
from train.config import CONFIGS, MOVED, Config, TrainConfig, check_whole_blocks, compose, read_yaml, to_yaml
from train.config.keys import all_keys, as_markdown, constructor, search
from train.phases import run
from train.record.resume import _flat
from train.sweep import Sweep

EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "exp").glob("*.yaml"))
DATA = "data.dataset=pairs.json"


def overrides(name: str) -> list[str]:
    return [f"+exp={name}" if name != "smoke" else "+exp=[lbm_2511,smoke]", DATA]


def test_the_experiments_are_those_of_the_readme():
    assert set(EXPERIMENTS) >= {"lbm_2511", "sft_2511", "sft_2509", "tiny_lbm", "tiny_sft", "smoke"}
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    config = compose(overrides(name))
    assert config.loss["_target_"].startswith("losses.")
    assert config.run_dir == f"runs/{config.name}"
    assert config.cache.dir == "cache"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_begins_with_its_command(name):
    lines = (CONFIGS / "exp" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# accelerate launch train/run.py ")
    assert name in lines[1]
    assert lines[2].startswith("# ")


def test_production_values():
    config = compose(overrides("lbm_2511"))
    assert config.adapter.rank == 64
    assert config.train.accumulation(1) == 16
    assert config.train.accumulation(8) == 2
    assert config.data.max_pixels == 1024**2
    assert config.train.max_grad_norm is None
    assert "Prodigy" in config.optim["_target_"]
    assert config.model.dtype == "bfloat16"


def test_the_resolved_text_composes_the_same(tmp_path):
    config = compose(overrides("sft_2509"))
    assert to_yaml(compose(overrides("sft_2509"))) == to_yaml(config)
    assert "${" not in to_yaml(config)


def test_a_target_may_be_named_by_where_its_module_was(tmp_path):
    """As configurations do that were saved, or written, before the module moved."""
    named = [*overrides("tiny_lbm"), "logger=all"]
    targets = {
        "validate._target_": "eval.validation.Validation",
        "validate.sampler._target_": "eval.samplers.BridgeSampler",
        "logger.tensorboard._target_": "train.loggers.TensorBoard",
        "logger.wandb._target_": "train.wandb_logger.WandB",
    }
    config = compose(named)
    assert compose([*named, *(f"{key}={target}" for key, target in targets.items())]) == config
    text = to_yaml(config)
    for before, now in MOVED.items():
        assert import_module(now)
        text = text.replace(f"_target_: {now}.", f"_target_: {before}.")
    assert all(target in text for target in targets.values())
    (tmp_path / "config.yaml").write_text(text)
    assert read_yaml(tmp_path / "config.yaml") == asdict(config)


def test_defaults_of_the_files_are_those_of_the_classes():
    """config.yaml repeats the classes; they must not drift."""
    composed = compose([DATA, "model=tiny"])
    assert composed.train == TrainConfig()
    assert composed.adapter == type(composed.adapter)()
    assert composed.cache.batch_size == type(composed.cache)().batch_size


AS_IT_STANDS = [
    "/x/Fotos Übung/a.json",
    "x (1).json",
    "[1].json",
    "a=b.json",
    "a&b.json",
    "it's.json",
    "x#1!.json",
    "x 'y'\\.json",
]


@pytest.mark.parametrize("path", AS_IT_STANDS)
def test_a_path_is_taken_as_it_stands(path):
    assert compose(["+exp=tiny_lbm", f"data.dataset={path}"]).data.dataset == path


def test_what_hydra_reads_as_a_list_is_a_path_where_there_is_one(tmp_path, monkeypatch):
    """Its own syntax comes first: numbers stay numbers, whatever files are called."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.json", "[c]", "3"):
        (tmp_path / name).write_text("")
        if name != "3":
            assert compose(["+exp=tiny_lbm", f"data.dataset={name}"]).data.dataset == name
    assert compose(["+exp=tiny_lbm", DATA, "train.num_steps=3"]).train.num_steps == 3
    assert Sweep.parse(["data.dataset=a,b.json"]).swept == []
    assert len(Sweep.parse(["data.dataset=a,c.json"]).swept) == 1


def test_an_experiment_without_its_plus_sign_is_named():
    with pytest.raises(InputError, match=r"an experiment is added with a plus sign: \+exp=NAME, with one of lbm_2511"):
        compose(["exp=tiny_lbm", DATA])


@pytest.mark.parametrize("key", ["run_dir", "cache.dir"])
def test_a_folder_that_cannot_be_made_is_named_at_once(key, tmp_path):
    (tmp_path / "file").write_text("")
    config = compose(["+exp=tiny_lbm", DATA, f"{key}={tmp_path}/file/x/y"])
    with pytest.raises(
        InputError, match=rf"{key}={tmp_path}/file/x/y cannot be a folder, because {tmp_path}/file is a file"
    ):
        run(config)


WRONG = {
    "rank=16": "unknown key rank: did you mean adapter.rank? (Rank of the LoRA)",
    "lr=1e-4": "unknown key lr: did you mean optim.lr? (Peak learning rate)",
    "learning_rate=1e-4": "did you mean optim.lr?",
    "train.learning_rate=1e-4": "did you mean optim.lr?",
    "optim.learning_rate=1e-4": "did you mean optim.lr?",
    "+optim.learning_rate=1e-4": "did you mean optim.lr?",
    "optim.lr=abc": "optim.lr must be a number, got 'abc'",
    "optim.warmup_steps=2.5": "optim.warmup_steps must be a whole number, got 2.5",
    "loss.sub_probs=1": "did you mean loss.sub_prob?",
    "+loss.sub_probs=1": "did you mean loss.sub_prob?",
    "+loss.something=1": "unknown key loss.something: loss has sigma, bridge_noise,",
    "output_dir=x": "did you mean run_dir?",
    "nonsense=1": "--keys WORD searches all keys",
    "trian.num_steps=3": "unknown key trian.num_steps",
    "train.num_step=3": "did you mean train.num_steps?",
    "data.max_pixel=3": "did you mean data.max_pixels?",
    "adapter.rnk=3": "did you mean adapter.rank?",
    "adapter.rank=-1": "adapter.rank must be positive, got -1",
    "adapter.alpha=0": "adapter.alpha must be positive, got 0.0",
    "adapter.target_modules=[]": "adapter.target_modules is empty",
    "adapter.target_modules=to_q": "adapter.target_modules must be a list such as [a,b], got 'to_q'",
    "adapter.decompose_factor=4": "adapter.decompose_factor=4 is for LoKr only: use adapter=lokr, or leave it out",
    "data.preserve_prompts=[x]": "data.preserve_prompts is only used with loss.preserve, which is 0",
    "adapter.dora=1": "adapter.dora must be true or false, got 1",
    "train.micro_batch_size=1.5": "train.micro_batch_size must be a whole number, got 1.5",
    "train.attention=flash3": "needs train.gradient_checkpointing=off or full, got auto",
    "train.gradient_checkpointing=half": "must be one of auto, off, selective, full, or a whole number, got 'half'",
    "train.offload_blocks=-1": "train.offload_blocks must be at least 0, got -1",
    "train.offload_blocks=all": "train.offload_blocks must be one of auto, or a whole number, got 'all'",
    "model.dtype=float16": "model.dtype must be one of bfloat16, float32, got 'float16'",
    "data.caption_dropout=1.0": "data.caption_dropout must lie in [0, 1), got 1.0",
    "cache.workers=0": "cache.workers must be at least 1, got 0",
    "optim=adamm": "there is no configs/optim/adamm.yaml: did you mean optim=adamw?",
    "phases=[]": "phases is empty",
    "model=null": "must be a string or a list",
    "seed=${nothing}": "nothing",
    "train.num_steps": "train.num_steps",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_named(override):
    with pytest.raises(InputError) as caught:
        compose(["+exp=tiny_lbm", DATA, override])
    assert WRONG[override] in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED = {
    "adapter.dora=true model.weights=fp8": "which model.weights=fp8 rounds: use model.weights=bf16",
    "model.weights=int4": "model.weights must be one of bf16, fp8, int8, nf4, got 'int4'",
}


NOT_OF_LOKR = {
    "adapter.dora=true": "adapter.dora=true, whose magnitudes are LoRA's, does not go with adapter.kind=lokr",
    "adapter.rslora=true": "adapter.rslora=true, whose scale is LoRA's, does not go with",
    "adapter.export_frozen=true": "adapter.export_frozen=true, which adds LoRA adapters up, does not go with",
    "adapter.decompose_factor=1": "adapter.decompose_factor must be 2 or more, or -1 for factors of equal size, got 1",
}


@pytest.mark.parametrize("override", NOT_OF_LOKR)
def test_what_is_loras_is_refused_with_lokr(override):
    with pytest.raises(InputError) as caught:
        compose(["+exp=tiny_lbm", DATA, "adapter=lokr", override])
    assert NOT_OF_LOKR[override] in str(caught.value)


@pytest.mark.parametrize("overrides", REFUSED)
def test_quantised_weights_are_refused_where_they_cannot_be(overrides):
    with pytest.raises(InputError) as caught:
        compose(["+exp=tiny_lbm", DATA, *overrides.split()])
    assert REFUSED[overrides] in str(caught.value)


@pytest.mark.parametrize("setting", ["adapter.dora=true", "model.weights=int8", "train.offload_blocks=3"])
def test_what_needs_whole_blocks_is_refused_where_they_are_cut(setting):
    """Under zero3 on several processes; one alone trains as single, and other strategies leave blocks whole."""

    def check(parallel: str, world_size: int) -> None:
        check_whole_blocks(compose(["+exp=tiny_lbm", DATA, setting, f"parallel={parallel}"]), world_size)

    for parallel, world_size in (("zero3", 2), ("zero3_offload", 1)):
        with pytest.raises(InputError) as caught:
            check(parallel, world_size)
        sentence = (
            f"{setting} needs whole blocks on every rank, which parallel={parallel} cuts: use parallel=single, ddp or"
        )
        assert sentence in str(caught.value)
    for parallel, world_size in (("zero3", 1), ("ddp", 2), ("zero2", 2), ("auto", 2)):
        check(parallel, world_size)


def test_every_key_of_the_files_is_known_with_its_meaning():
    """What `--keys` prints and the manual holds, against the composed experiments and the classes themselves."""
    keys = {key.name: key for key in all_keys()}
    for name in EXPERIMENTS:
        config = compose(overrides(name))
        passed_on = "optim." if constructor(config.optim["_target_"]).is_open else None
        for key, value in _flat(asdict(config)).items():
            known = any(key == other or key.startswith((f"{other}.", *filter(None, [passed_on]))) for other in keys)
            assert known or key.endswith("_target_") or value == {}, key
    assert [key.name for key in keys.values() if not key.meaning] == []
    for name, default in _flat(asdict(TrainConfig()), "train.").items():
        assert str(yaml.safe_load(keys[name].default)) == str(default), name
    assert keys["train.gradient_checkpointing"].kind == "auto, off, selective, full or a whole number"
    assert [key.name for key in search("clipping")] == ["train.max_grad_norm"]


def test_the_manual_is_made_from_the_sources():
    """CONTRIBUTING says how."""
    assert (ROOT / "docs" / "configuration.md").read_text() == as_markdown()


def test_a_model_must_be_chosen():
    with pytest.raises(InputError, match=r"model\.path is not set: choose a model with model=tiny"):
        compose([DATA])


@given(st.integers(1, 10**6), st.floats(1e-3, 10, allow_nan=False))
@settings(max_examples=20, deadline=None)
def test_values_arrive_as_given(num_steps, norm):
    config: Config = compose(["+exp=tiny_lbm", DATA, f"train.num_steps={num_steps}", f"train.max_grad_norm={norm}"])
    assert config.train.num_steps == num_steps
    assert config.train.max_grad_norm == pytest.approx(norm)
