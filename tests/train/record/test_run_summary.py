"""The table that a sweep ends with."""

import json

import pytest

from train.record.run_summary import as_table


def cells(folder, runs: dict[str, dict | None]) -> list[list[str]]:
    """The table's rows for runs of 5 steps with these `best.json`."""
    for name, best in runs.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": step / 10}) for step in range(1, 6)]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')  # killed while it wrote
        (folder / name / "checkpoints/latest").write_text("step-000004\n")
        if best:
            (folder / name / "checkpoints/best.json").write_text(json.dumps(best))
    (folder / "multirun.yaml").touch()
    table = as_table(sorted(folder.iterdir()))
    return [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]


@pytest.mark.parametrize(("name", "order"), [("validation/steps_4/psnr", "bca"), ("validation/steps_4/lpips", "acb")])
def test_the_best_run_is_first(tmp_path, name, order):
    """Where more is better, and where less is; one without a validation is the last."""
    values = {"a": 20.5, "b": 22.25, "c": 21.0}
    judged = {run: {"step": 3, "name": name, "value": value} for run, value in values.items()}
    found = cells(tmp_path, judged | {"0 none": None})
    assert [row[0] for row in found] == [*order, "0 none"]
    assert found[0][1:4] == ["5", "0.3", f"{values[order[0]]} {name} at step 3"]
    assert found[0][4] == f"{tmp_path}/{order[0]}/checkpoints/step-000003"
    assert found[-1][3:] == ["", f"{tmp_path}/0 none/checkpoints/step-000004"]


def test_nothing_trained_is_no_row(tmp_path):
    assert cells(tmp_path, {}) == []
