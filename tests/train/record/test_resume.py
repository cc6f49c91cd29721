"""What a continued run may do otherwise, and what it may not."""

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_prep.errors import InputError
from train.config import compose
from train.record.resume import check_identity, check_settings


def saved(folder: Path, *overrides: str, without: tuple[str, ...] = ()) -> Path:
    """A checkpoint's configuration, as an earlier version without some keys wrote it."""
    values = asdict(compose(["+exp=tiny_lbm", "data.dataset=pairs.json", *overrides]))
    for key in without:
        section, name = key.split(".")
        del values[section][name]
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.dataset=moved/pairs.json", "data.root=elsewhere"],
        ["model.path=other/place", "cache.dir=c", "name=new", "logger=tensorboard", "validate=none"],
        ["train.save_every=7", "train.keep_every=2", "train.best_by=null", "train.log_every=3", "parallel=ddp"],
        ["train.global_batch_size=8", "train.grad_accum_steps=null", "train.gradient_checkpointing=full"],
    ],
)
def test_what_does_not_change_the_training_is_continued(tmp_path, overrides):
    check_settings(compose(["+exp=tiny_lbm", "data.dataset=pairs.json", *overrides]), saved(tmp_path / "step-000001"))


def test_new_keys_with_their_defaults_are_continued(tmp_path):
    """Of a section, and of the class of an open node."""
    old = saved(
        tmp_path / "step-000001", without=("train.keep_every", "adapter.dora", "optim.schedule_steps", "loss.sub_prob")
    )
    config = compose(["+exp=tiny_lbm", "data.dataset=pairs.json"])
    config.loss["sub_prob"] = 0.25  # the class's own default
    check_settings(config, old)
    config.loss["sub_prob"] = 0.5
    with pytest.raises(InputError, match=r"loss\.sub_prob was 0\.25 and is 0\.5"):
        check_settings(config, old)


def test_a_refusal_names_old_and_new(tmp_path):
    config = compose(["+exp=tiny_lbm", "data.dataset=pairs.json", "adapter.rank=8", "seed=3", "data.max_pixels=2048"])
    with pytest.raises(InputError) as caught:
        check_settings(config, saved(tmp_path / "step-000001"))
    assert "adapter.rank was 32 and is 8; data.max_pixels was " in str(caught.value)
    assert "seed was 0 and is 3. Give the same command" in str(caught.value)


def test_more_steps_under_a_cosine_are_a_choice(tmp_path):
    more = ["+exp=tiny_lbm", "data.dataset=pairs.json", "train.num_steps=2000"]
    old = saved(tmp_path / "step-000001", without=("optim.schedule_steps",))
    for steps in (1000, 2000):
        check_settings(compose([*more, f"optim.schedule_steps={steps}"]), old)
    with pytest.raises(InputError, match=r"choose with optim\.schedule_steps=1000 \(stay"):
        check_settings(compose(more), old)


def test_records_model_and_global_batch_are_compared_by_themselves(tmp_path):
    before = {"data": "a", "model": "m", "global_batch_size": 4, "group_size": 1}
    check_identity(tmp_path, before | {"optimizer": "AdamW"}, before)
    check_identity(
        tmp_path, {"data": "a", "global_batch_size": 4, "group_size": 1}, before
    )  # of a version that did not say its model
    words_of = {
        "data": "the training data",
        "model": "the model's weights",
        "global_batch_size": "the global batch",
        "group_size": "train.group_size",
    }
    for key, words in words_of.items():
        with pytest.raises(InputError, match=f"{words} (was|has changed)"):
            check_identity(tmp_path, before, before | {key: 8})
