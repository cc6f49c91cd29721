"""The commands that a complete run ends with."""

import json
import shlex

from train.config import compose
from train.record.what_next import what_next


def test_the_best_checkpoint_and_the_dataset_that_has_held_out_rows(tmp_path):
    row = {"prompt": "it's an edit", "image": "a.png", "edit_image": ["b.png", "c d.png"]}
    for name, split in ("one", "train"), ("two", "validation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.json").write_text(json.dumps([row, row | {"split": split}]))
    (tmp_path / "checkpoints").mkdir()
    best = {"step": 3, "name": "validation/steps_4/psnr", "value": 21.5}
    (tmp_path / "checkpoints/best.json").write_text(json.dumps(best))
    datasets = f"data.dataset=[{tmp_path}/one/rows.json,{tmp_path}/two/rows.json]"
    config = compose(["+exp=tiny_lbm", datasets, f"run_dir={tmp_path}"])
    where, edit, score, _ = what_next(config, tmp_path / "checkpoints", 5, held_out=True).splitlines()
    assert f"the adapter is {tmp_path}/checkpoints/step-000003, the best by validation/steps_4/psnr (21.5)" in where
    assert "the last is step-000005" in where
    words = shlex.split(edit)
    assert words[words.index("--prompt") + 1] == "it's an edit"
    images = [words[place + 1] for place, word in enumerate(words) if word == "--image"]
    assert [image.rpartition("two/")[2] for image in images] == ["b.png", "c d.png"]
    words = shlex.split(score)
    assert words[words.index("--dataset") + 1] == f"{tmp_path}/two/rows.json"
