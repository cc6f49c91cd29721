"""What the evaluation command refuses before it loads or computes anything."""

from pathlib import Path

import pytest

from data_prep.errors import InputError
from eval import run
from eval.request.knobs import AdapterUse


@pytest.mark.parametrize(
    ("way", "given", "named"),
    [
        ("runs", {"wandb": "p", "dataset": "d.json", "rank_by": "ssim"}, "--dataset, --rank-by, --wandb"),
        ("runs", {"push_to": "me/mine", "publish_card": True, "seed": 3}, "--publish-card, --push, --seed"),
        ("runs", {"steps": [4], "cfg_scale": 1.0, "device": "cpu"}, "--steps, --cfg-scale, --device"),
        ("pictures", {"steps": [4], "base": True, "batch_size": 2}, "--base, --steps, --batch-size"),
        ("pictures", {"strength": 0.0, "max_pixels": 4096}, "--strength, --max-pixels"),
        ("pictures", {"adapter": [AdapterUse(Path("a"))], "publish_card": True}, "--adapter, --publish-card"),
        ("pictures", {"weights": "int8", "title": "t", "wandb": "p", "device": "cpu"}, "--weights"),
    ],
)
def test_options_of_another_way_are_refused_by_name(tmp_path, way, given, named):
    with pytest.raises(InputError, match=f"^--{way} .*: leave out {named}$"):
        run.score(**{way: [tmp_path]}, **given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
