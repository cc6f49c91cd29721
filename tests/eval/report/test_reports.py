"""The evaluation command and the report, through the real commands on the tiny model."""

import csv
import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image

from data_prep.cli import run_command
from data_prep.errors import InputError
from data_prep.model.geometry import Geometry, Size, fit
from data_prep.rows.images import file_digest
from data_prep.rows.rows import RejectedRow, Row
from eval import run
from eval.report.chart import MAX_POINTS, line_chart, thin, ticks
from eval.report.evaluation_page import ScoreCell, prompt_tables, score_tables, write_page
from eval.report.run_history import RunSummary, compare_runs, read_runs
from eval.request.knobs import AdapterUse
from eval.request.provenance import read_png
from eval.scores.methods import own_names, run_name
from eval.scores.splits import chosen_rows
from tests.adapters import write_adapter
from tests.caching import write_image
from tests.commands import run_script
from tests.tiny_weights import write_clip, write_dino, write_features
from tests.wandb_log import Written

pytestmark = pytest.mark.slow

SMALL = Geometry(max_pixels=64 * 64, vision_pixels=56 * 56)


class Page(HTMLParser):
    """The parts of a page that a test looks at."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def metrics(psnr: float, steps: tuple[int, ...] = (1, 4), sampler: str = "BridgeSampler", source: float = 20.0) -> dict:
    """What a validation of eight rows writes, with about the same PSNR + n at n steps; half of them have each instruction."""
    rows = [
        {
            "id": f"r{number}",
            "prompt": "<b>one</b>" if number < 4 else "two",
            "source": {"psnr": source + number / 8, "ssim": 0.5},
            **{f"steps_{n}": {"psnr": psnr + n + number / 8, "ssim": 0.6} for n in steps},
        }
        for number in range(8)
    ]
    names = ["source", *(f"steps_{n}" for n in steps)]
    means = {name: {"psnr": fmean(row[name]["psnr"] for row in rows), "ssim": rows[0][name]["ssim"]} for name in names}
    seconds = {f"steps_{n}": 0.1 * n for n in steps}
    return {"num_rows": 8, **means, "seconds_per_edit": seconds, "per_row": rows, "sampler": {"name": sampler}}


@pytest.fixture
def runs():
    history = [{"step": n, "loss": 1 / n, "loss/latent/main": 2 / n} for n in range(1, 400)]
    history += [
        {"step": n, "validation/steps_4/psnr": 20 + n / 100, "validation/source/psnr": 20.0} for n in (200, 400)
    ]
    lbm = RunSummary("lbm", metrics(22.0), step=400, history=history)
    return [lbm, RunSummary("flow", metrics(19.0, (4, 20), "FlowSampler"), step=400)]


def cells_of(report: dict, column: str = "psnr") -> dict[str, ScoreCell]:
    """A column of the first table, by the methods' labels."""
    table = score_tables(report)[0]
    place = [metric.name for metric in table.headings].index(column)
    return {method["label"]: cells[place] for method, cells in table.rows}


def test_a_table_has_the_source_once_and_every_run_at_every_step_count(runs):
    report = compare_runs("t", runs)
    cells = cells_of(report)
    assert list(cells) == ["source unchanged", "lbm, 1 step", "lbm, 4 steps", "flow, 4 steps", "flow, 20 steps"]
    assert (cells["source unchanged"].text, cells["source unchanged"].gain) == ("20.44", "")
    assert (cells["lbm, 4 steps"].text, cells["lbm, 4 steps"].gain, cells["lbm, 4 steps"].better) == (
        "26.44",
        "+6.00",
        True,
    )
    assert [label for label, cell in cells.items() if cell.best] == ["flow, 20 steps"]  # 39 dB
    assert [method["seconds_per_edit"] for method in report["methods"][1:]] == pytest.approx([0.1, 0.4, 0.4, 2.0])
    one, two = prompt_tables(report)
    assert (one.title, two.title) == ("“<b>one</b>”", "“two”")
    assert [cells[0].text for _, cells in two.rows][:2] == ["20.69", "23.69"]  # the mean of rows 4 to 7


def test_equal_pictures_are_called_equal(runs):
    for row in runs[0].metrics["per_row"]:
        row["source"]["psnr_background"], row["steps_1"]["psnr_background"] = 100.0, 30.0
    cells = {m["label"]: c for m, c in score_tables(compare_runs("t", runs[:1]))[1].rows}
    assert [cells[name][0].text for name in ("source unchanged", "lbm, 1 step")] == ["equal", "30.00"]
    assert cells["lbm, 1 step"][0].gain == ""
    assert "lbm, 4 steps" not in cells


def test_another_source_is_shown_again(runs):
    other = RunSummary("other", metrics(10.0, source=9.0))
    report = compare_runs("t", [*runs, other])
    assert [each["name"] for each in report["methods"] if each["kind"] == "source"] == ["source", "source-2"]
    assert cells_of(report)["other, 1 step"].gain == "+2.00"


def test_white_is_a_line_of_its_own(runs):
    for row in runs[0].metrics["per_row"]:
        row["white/steps_1"] = {"psnr": 15.0}
    runs[0].metrics["seconds_per_edit"]["white/steps_1"] = 0.1
    assert cells_of(compare_runs("t", runs[:1]))["lbm, white, 1 step"].text == "15.00"


def test_the_page_is_well_formed_escaped_and_loads_nothing(runs, tmp_path):
    write_page(tmp_path / "report.html", compare_runs("A & <B>", runs), None, "psnr", runs)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "A &amp; &lt;B&gt;" in text
    assert "“&lt;b&gt;one&lt;/b&gt;”" in text
    assert page.tags.count("svg") == 2 + 2  # losses and PSNR over training, PSNR and SSIM against steps
    assert page.sources == []
    assert "http" not in text


def test_charts_have_round_ticks_and_few_points():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(13.0, 31.5) == [10, 15, 20, 25, 30, 35]
    assert len(ticks(3.0, 3.0)) >= 3
    thinned = thin([(float(x), 2.0 * x) for x in range(10_000)] + [(5.0, float("nan"))])
    assert len(thinned) <= MAX_POINTS
    assert all(y == pytest.approx(2 * x) for x, y in thinned)
    chart = line_chart({"<a>": [(0, 1.0), (1, 2.0)]}, "step")
    assert "&lt;a&gt;" in chart
    assert len(re.findall("<circle", chart)) == 2
    with pytest.raises(ValueError, match="at least one finite point"):
        line_chart({"a": []}, "step")


def test_a_folder_without_validation_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no validation/step-"):
        read_runs([tmp_path])


def test_the_command_reads_the_last_validation_of_each_run(tmp_path):
    for name, sampler in (("lbm", "BridgeSampler"), ("flow", "FlowSampler")):
        for step, psnr in ((9, 21.0), (400, 25.0)):
            folder = tmp_path / name / "validation" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics(psnr, sampler=sampler)))
            Image.new("RGB", (8, 8)).save(folder / "grid.png")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    assert read_runs([tmp_path / "lbm"])[0].step == 400
    chosen = ("--runs", tmp_path / "lbm", "--runs", tmp_path / "flow")
    done = run_script("eval/run.py", *chosen, "--out", tmp_path)
    assert "29.44" in done.stdout  # 25 + 4 steps
    assert json.loads((tmp_path / "report.json").read_text())["num_rows"] == 8
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("img") == 2
    assert page.tags.count("svg") == 2 + 2


@pytest.fixture(scope="module")
def scored(tiny_model_dir, tiny_pairs, tmp_path_factory):
    """One evaluation with everything on: the finished command, its folder, and the folder of the first adapter."""
    folder = tmp_path_factory.mktemp("evaluation")
    lbm = write_adapter(folder / "lbm" / "checkpoints" / "step-000001", tiny_model_dir, "lbm", SMALL)
    flow = write_adapter(folder / "flow" / "checkpoints" / "step-000001", tiny_model_dir, "flow", SMALL)
    (lbm / "optimizer.safetensors").write_bytes(b"not for others")
    clip, dino = write_clip(folder / "clip"), write_dino(folder / "dino")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))}
    done = run_script(
        *("eval/run.py", "--model", tiny_model_dir, "--adapter", lbm, "--adapter", flow, "--base", "--cfg-scale", "1"),
        *("--dataset", tiny_pairs / "validation.json", "--root", tiny_pairs, "--steps", "1,2", "--out", folder / "out"),
        *(
            "--clip",
            clip,
            "--dino",
            dino,
            "--torch-hub",
            folder / "empty",
            "--fid",
            write_features(folder / "mean.pt2"),
        ),
        *("--face", folder / "empty", "--wandb", "edits", "--publish-card", "--license", "apache-2.0"),
        env=environment | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
    )
    return done, folder / "out", lbm


@pytest.fixture(scope="module")
def measured(scored):
    """Its `report.json`."""
    return json.loads((scored[1] / "report.json").read_text())


EDITED = [f"{name}/steps_{steps}" for name in ("lbm", "flow", "base") for steps in (1, 2)]


def test_every_adapter_and_the_base_are_scored_at_every_step_count(scored, measured):
    done, out, _ = scored
    assert "edits/results.csv: 24 of 24 rows, 24 edited now" in done.stdout
    assert {method["name"] for method in measured["methods"]} == {"source", "target", *EDITED}
    assert all(method["seconds_per_edit"] > 0 for method in measured["methods"] if method["adapter"])
    assert [row.keys() for row in measured["per_row"]] == [{"id", "prompt", "scores"}] * 4
    for name in ("lbm", "flow", "base"):
        own = json.loads((out / name / "metrics.json").read_text())
        assert own["num_rows"] == 4
        assert own["steps_2"].keys() >= {"psnr", "ssim", "psnr_edited", "psnr_background", "clip_i", "drifted"}
        assert own["steps_2"]["psnr"] == score(measured, f"{name}/steps_2", "psnr")["mean"]
    assert score(measured, "lbm/steps_1", "psnr") != score(measured, "flow/steps_1", "psnr")
    assert "lbm, 2 steps" in done.stdout


def score(report: dict, method: str, metric: str) -> dict:
    """A method's mean and interval."""
    (found,) = (each for each in report["methods"] if each["name"] == method)
    return found["scores"][metric]


def test_the_means_and_tests_are_those_of_the_rows(measured):
    rows = [row["scores"] for row in measured["per_row"]]
    values = [row["flow/steps_1"]["psnr"] for row in rows]
    interval = score(measured, "flow/steps_1", "psnr")
    assert interval["mean"] == pytest.approx(sum(values) / 4)
    assert min(values) <= interval["low"] <= interval["mean"] <= interval["high"] <= max(values)
    assert score(measured, "lbm/steps_1", "psnr_edited")["num_rows"] == 2  # the rows with a mask
    pairs = [(test["first"], test["second"]) for test in measured["tests"] if test["metric"] == "psnr"]
    assert len(pairs) == len({frozenset(pair) for pair in pairs}) == 7 * 6 // 2
    (test,) = (
        each for each in measured["tests"] if [each["metric"], each["first"], each["second"]] == ["psnr", *EDITED[1:3]]
    )
    differences = [row[EDITED[1]]["psnr"] - row[EDITED[2]]["psnr"] for row in rows]
    assert test["difference"]["mean"] == pytest.approx(sum(differences) / 4)
    signs = list(itertools.product((-1, 1), repeat=4))
    sums = [abs(sum(sign * value for sign, value in zip(some, differences, strict=True))) for some in signs]
    assert test["p"] == pytest.approx(sum(each >= abs(sum(differences)) - 1e-9 for each in sums) / 16)


def test_what_the_source_unchanged_must_score(measured):
    for row in measured["per_row"]:
        source = row["scores"]["source"]
        assert source["structure"] == 0
        assert "clip_direction" not in source  # a picture that did not change has no direction
        assert source.get("psnr_background_pie", 100) == 100
        assert source["drifted"] == source.get("drift_shift", 0) == 0
    assert score(measured, "source", "fid")["num_rows"] == 4


def test_weights_that_cannot_be_had_are_reported_and_the_rest_goes_on(scored, measured):
    done, out, _ = scored
    unavailable = measured["unavailable"]
    assert unavailable.keys() == {"lpips", "lpips_background_pie", "dists", "identity", "face_kept"}
    assert "alexnet-owt-7be5be79.pth is not in" in unavailable["lpips"]
    assert "not measured: dists (vgg16-397923af.pth" in done.stdout
    assert "vgg16-397923af.pth is not in" in (out / "report.html").read_text()


def test_the_page_of_an_evaluation_is_whole_and_loads_nothing(scored):
    text = (scored[1] / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 3 * (2 + len(EDITED))  # best, median, worst: source, edits, target
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert page.tags.count("svg") == text.count("<h3>PSNR") + text.count("<h3>SSIM, ") + 5
    for word in ("best", "median", "worst"):
        assert f'<span class="tag">{word}</span>' in text


def test_every_picture_is_kept(scored):
    found = {path.parent.relative_to(scored[1] / "pictures").as_posix() for path in scored[1].glob("pictures/**/*.jpg")}
    assert found == {"source", "target", *EDITED}
    assert len(list(scored[1].glob("pictures/**/*.jpg"))) == 4 * 8
    with Image.open(scored[1] / "pictures" / "lbm" / "steps_1" / "00000.jpg") as picture:
        assert picture.size == (64, 64)


def test_the_table_on_wandb(scored, measured):
    (folder,) = (scored[1] / "wandb").glob("offline-run-*")
    (file,) = (folder / "files" / "media" / "table" / "evaluation").glob("rows_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"][:4] == ["id", "prompt", "method", "psnr"]
    assert table["columns"][-3:] == ["source", "edit", "target"]
    assert len(table["data"]) == 4 * len(EDITED)
    line = next(each for each in table["data"] if each[2] == "flow/steps_2")
    row = next(each for each in measured["per_row"] if each["id"] == line[0])
    assert line[3] == row["scores"]["flow/steps_2"]["psnr"]
    written = Written(folder)
    (artifact,) = written.of("artifact")
    pictures = [each.path for each in artifact.manifest.contents if each.path.startswith("media/images/")]
    assert len(pictures) == 4 * (2 + len(EDITED))  # sources and targets once
    assert written.summary()["flow/steps_2/psnr"] == score(measured, "flow/steps_2", "psnr")["mean"]


def test_the_card_is_beside_the_adapter(scored, measured):
    adapter = scored[2]
    card = ModelCard.load(adapter / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-to-image")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["PSNR, 2 steps"] == pytest.approx(score(measured, "lbm/steps_2", "psnr")["mean"], abs=1e-6)
    assert "| lbm, 1 step |" in card.text
    assert "| flow, 1 step |" not in card.text
    pictures = re.findall(r"\]\((samples/[^)]+)\)", card.text)
    assert len(pictures) == 4
    assert all((adapter / name).is_file() for name in pictures)


def test_fewer_rows_a_card_and_a_hub_that_is_not_there(tiny_model_dir, tiny_pairs, tmp_path, monkeypatch, capsys):
    """Only the chosen rows are encoded, and nothing of an earlier evaluation is published."""
    adapter = write_adapter(tmp_path / "mine" / "checkpoints" / "step-000001", tiny_model_dir, "lbm", SMALL)
    for old in (tmp_path / "out" / "mine" / "row-7.jpg", adapter / "samples" / "row-7.jpg"):
        old.parent.mkdir(parents=True, exist_ok=True)
        old.write_bytes(b"of an earlier evaluation")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    dataset = tiny_pairs / "validation.json"
    with pytest.raises(SystemExit, match="error: me/mine was not uploaded"):
        run.score(
            model=str(tiny_model_dir),
            adapter=[AdapterUse(adapter, 0.5)],
            dataset=str(dataset),
            root=str(tiny_pairs),
            steps=[1],
            num_rows=2,
            metrics=["psnr"],
            device="cpu",
            dtype="float32",
            publish_card=True,
            license="mit",
            push_to="me/mine",
            out=tmp_path / "out",
        )
    assert "2 of 2 rows, 2 edited now" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out" / "mine").glob("row-*")} == {"row-0.jpg", "row-1.jpg"}
    assert {path.name for path in (adapter / "samples").iterdir()} == {"row-0.jpg", "row-1.jpg"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(re.escape(row["prompt"]) in re.escape((adapter / "README.md").read_text()) for row in report["per_row"])
    assert len(report["per_row"]) == report["settings"]["num_rows"] == 2
    weights = adapter / "adapter_model.safetensors"
    used = {"path": str(weights), "digest": file_digest(weights), "weight": 0.5}
    assert report["settings"]["adapters"] == {"mine": used}
    assert report["settings"]["dataset_digest"] == file_digest(dataset)


def test_training_rows_are_scored_only_when_asked_for_and_never_as_an_evaluation(
    tiny_model_dir, tiny_pairs, tmp_path, capsys
):
    """One file with both splits: the held-out rows by default; all of them marked in terminal, report, page and card."""
    adapter = write_adapter(tmp_path / "mine" / "checkpoints" / "step-000001", tiny_model_dir, "lbm", SMALL)
    rows = [row for name in ("train", "validation") for row in json.loads((tiny_pairs / f"{name}.json").read_text())]
    wanted = {"model": str(tiny_model_dir), "adapter": [AdapterUse(adapter)], "root": str(tiny_pairs), "steps": [1]}
    wanted |= {"metrics": ["psnr"], "device": "cpu", "dtype": "float32", "publish_card": True, "license": "mit"}
    (tmp_path / "both.json").write_text(json.dumps(rows[10:14]))

    def scored_rows(**changed) -> tuple[list[str], str | None, str]:
        run.score(**wanted, dataset=str(tmp_path / "both.json"), out=tmp_path / "out", **changed)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return [row["id"] for row in report["per_row"]], report["settings"]["caution"], capsys.readouterr().out

    assert scored_rows()[:2] == ([row["id"] for row in rows[12:14]], None)
    assert ModelCard.load(adapter / "README.md").data.eval_results
    page = tmp_path / "out" / "report.html"
    assert "not held out" not in page.read_text()
    ids, caution, printed = scored_rows(split="all")
    assert ids == [row["id"] for row in rows[10:14]]
    assert caution == "2 of the 4 rows are training rows (split=train), not held out."
    assert f"caution: {caution}" in printed
    assert caution in page.read_text()
    card = ModelCard.load(adapter / "README.md")
    assert card.data.eval_results is None
    assert caution in card.text


def test_pictures_of_another_tool_are_scored_without_a_model(scored, measured, tiny_pairs, tmp_path, capsys):
    """Copies of the evaluation's own edits, called as rows or as targets, have its scores; the targets themselves are equal."""
    rows = json.loads((tiny_pairs / "validation.json").read_text())
    edits = {line["id"]: scored[1] / "edits" / line["output"] for line in read_csv(scored[1] / "edits" / "results.csv")}
    made, perfect = tmp_path / "made", tmp_path / "perfect"
    for folder in (made, perfect):
        folder.mkdir()
    for number, row in enumerate(rows):
        name = row["id"] if number % 2 else Path(row["image"]).stem
        shutil.copy(edits[f"flow/steps_2/{row['id']}"], made / f"{name}.png")
        with Image.open(tiny_pairs / row["image"]) as image:
            fit(image.convert("RGB"), Size(64, 64)).save(perfect / f"{row['id']}.png")
    wanted = {"pictures": [made, perfect], "dataset": str(tiny_pairs / "validation.json"), "root": str(tiny_pairs)}
    wanted |= {"metrics": ["psnr", "ssim"], "device": "cpu"}
    run.score(**wanted, out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for found, row in zip(report["per_row"], measured["per_row"], strict=True):
        assert found["scores"]["made"]["psnr"] == row["scores"]["flow/steps_2"]["psnr"]
        assert found["scores"]["perfect"] == found["scores"]["perfect"] | {"psnr": 100.0, "ssim": 1.0}
    assert score(report, "made", "psnr") == score(measured, "flow/steps_2", "psnr")
    assert (report["settings"]["model"], report["settings"]["pictures"]["made"]) == (None, str(made))
    next(made.iterdir()).unlink()
    with pytest.raises(InputError, match=r"1 of 4 rows cannot be scored, .*made has no image named"):
        run.score(**wanted, out=tmp_path / "out")
    run.score(**wanted, on_error="skip", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_rows"] == 3


def test_two_folders_stand_in_for_a_dataset(tmp_path):
    for number, folder in enumerate(("sources", "targets", "made")):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            write_image(tmp_path / folder / f"{name}.png", number)
    folders = {"sources": tmp_path / "sources", "targets": tmp_path / "targets"}
    run.score(pictures=[tmp_path / "made"], **folders, metrics=["psnr"], device="cpu", out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    pictures = [
        np.asarray(Image.open(tmp_path / folder / "a.png").convert("RGB")) / 255 for folder in ("made", "targets")
    ]
    expected = -10 * np.log10(np.square(pictures[0] - pictures[1]).mean())
    assert report["per_row"][0]["scores"]["made"]["psnr"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="--dataset, or with the two folders --sources and --targets"):
        run.score(pictures=[tmp_path / "made"], sources=tmp_path / "sources", device="cpu", out=tmp_path / "out")


def test_an_evaluation_goes_on_where_it_was_and_has_any_sampler(tiny_model_dir, tiny_pairs, tmp_path, capsys):
    """Two pictures are lost, and those alone are made again, byte for byte; by Lightning's own schedule at 4 steps."""
    flow = write_adapter(tmp_path / "flow", tiny_model_dir, "flow", SMALL)
    wanted = {"model": str(tiny_model_dir), "adapter": [AdapterUse(flow)], "sampler": "lightning", "metrics": ["psnr"]}
    wanted |= {
        "dataset": str(tiny_pairs / "validation.json"),
        "root": str(tiny_pairs),
        "device": "cpu",
        "batch_size": 2,
    }
    run.score(**wanted, out=tmp_path / "out")
    first = {path: path.read_bytes() for path in (tmp_path / "out/edits").glob("*.png")}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [method["name"] for method in report["methods"] if method["kind"] == "edit"] == ["flow/steps_4"]
    assert read_png(next(iter(first)))["sampler"]["shift"] == "lightning"
    for path in list(first)[:2]:
        path.unlink()
    capsys.readouterr()
    run.score(**wanted, out=tmp_path / "out")
    assert "4 of 4 rows, 2 edited now" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["per_row"] == report["per_row"]
    assert {path: path.read_bytes() for path in first} == first
    with pytest.raises(InputError, match="sampler=bridge needs an adapter that is a bridge"):
        run.score(**wanted | {"sampler": "bridge"}, out=tmp_path / "out")


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_chosen_by_the_seed_and_rejected_ones_are_all_reported():
    rows = [Row(n, f"r{n}", "edit", Path("t.png"), (Path("s.png"),)) for n in range(1, 21)]
    bad = RejectedRow(21, "r21", "x.png", "broken")
    chosen = chosen_rows([*rows, bad], 5, seed=0)
    assert chosen[-1] == bad
    assert [row.number for row in chosen[:-1]] == sorted({row.number for row in chosen[:-1]})
    assert len(chosen) == 6
    assert chosen_rows([*rows, bad], 5, seed=0) == chosen != chosen_rows([*rows, bad], 5, seed=1)
    assert chosen_rows([*rows, bad], None, seed=0) == [*rows, bad]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--num-rows", "0", "'--num-rows': Input should be greater than or equal to 1"),
        ("--batch-size", "0", "'--batch-size': Input should be greater than or equal to 1"),
        ("--steps", "1,0", "'--steps': must look like 1,2,4, each 1 or more and at most 1000, got '1,0'"),
        ("--steps", "1;2", "'--steps': must look like 1,2,4"),
    ],
)
def test_counts_are_refused_by_their_own_names_before_anything_is_read(monkeypatch, capsys, option, value, message):
    command = ["eval/run.py", "--model", "nowhere", "--dataset", "nothing.json", "--out", "o", option, value]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        run_command(run.score)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_adapters_get_names_of_their_own():
    paths = ["runs/lbm", "other/lbm/checkpoints/step-000004", "runs/cache", "runs/cache-2", "runs/wandb", "runs/base"]
    assert list(own_names(run_name(Path(path)) for path in paths)) == [
        "lbm",
        "lbm (2)",
        "cache (2)",
        "cache-2",
        "wandb (2)",
        "base (2)",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "nothing.json"}, "nothing.json"),
        ({"rank_by": "beauty"}, "there is no metric 'beauty'"),
        ({"metrics": ["ssim"], "rank_by": "mse"}, "--rank-by mse is not measured"),
        ({"rank_by": "lpips"}, "--rank-by lpips is not measured: alexnet"),
        ({"publish_card": True}, "give one with --adapter"),
    ],
)
def test_wrong_input_is_one_sentence(tiny_model_dir, tiny_pairs, tmp_path, changed, message):
    wanted = {"model": str(tiny_model_dir), "dataset": str(tiny_pairs / "validation.json"), "root": str(tiny_pairs)}
    wanted |= {"device": "cpu", "dtype": "float32"}
    with pytest.raises(InputError, match=message):
        run.score(**(wanted | {"out": tmp_path, "torch_hub": tmp_path, "metrics": ["psnr", "lpips"]} | changed))
