"""The evaluation command and the report, through the real commands on the tiny model."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.geometry import Geometry
from eval.chart import MAX_POINTS, line_chart, thin, ticks
from eval.report import SOURCE, RunSummary, read_run, table_cells, table_columns, table_lines, write_report
from tests.adapters import write_adapter
from tests.commands import run_script

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


def metrics(psnr: float, steps: tuple[int, ...] = (1, 4), sampler: str = "BridgeSampler") -> dict:
    """What a validation writes, with the same PSNR + n at n steps."""
    scores = {"source": {"psnr": 20.0, "ssim": 0.5}}
    scores |= {f"steps_{n}": {"psnr": psnr + n, "ssim": 0.6} for n in steps}
    return {
        "num_rows": 2,
        **scores,
        "seconds_per_edit": {f"steps_{n}": 0.1 * n for n in steps},
        "by_prompt": {"<b>one</b>": {"num_rows": 1, **scores}, "two": {"num_rows": 1, **scores}},
        "per_row": [],
        "sampler": {"name": sampler},
    }


@pytest.fixture
def runs():
    history = [{"step": n, "loss": 1 / n, "loss/latent/main": 2 / n} for n in range(1, 400)]
    history += [
        {"step": n, "validation/steps_4/psnr": 20 + n / 100, "validation/source/psnr": 20.0} for n in (200, 400)
    ]
    lbm = RunSummary("lbm", metrics(22.0), step=400, history=history)
    return [lbm, RunSummary("flow", metrics(19.0, (4, 20), "FlowSampler"), step=400)]


def test_a_table_has_the_source_once_and_every_run_at_every_step_count(runs):
    lines = table_lines(runs)
    assert [line.label for line in lines] == [
        SOURCE,
        *("lbm, 1 step", "lbm, 4 steps"),
        *("flow, 4 steps", "flow, 20 steps"),
    ]
    assert table_columns(lines).keys() == {"psnr", "ssim", "seconds"}
    cells = dict(table_cells(lines))
    assert [cell.text for cell in cells[SOURCE]] == ["20.00", "0.500", "–"]
    assert (cells["lbm, 4 steps"][0].text, cells["lbm, 4 steps"][0].gain) == ("26.00", "+6.00")
    assert [label for label, row in cells.items() if row[0].best] == ["flow, 20 steps"]  # 39 dB
    assert [label for label, row in cells.items() if row[2].best] == ["lbm, 1 step"]


def test_equal_pictures_are_called_equal(runs):
    runs[0].metrics["source"]["psnr_background"] = 100.0
    runs[0].metrics["steps_1"]["psnr_background"] = 30.0
    column = list(table_columns(table_lines(runs[:1]))).index("psnr_background")
    cells = dict(table_cells(table_lines(runs[:1])))
    assert cells[SOURCE][column].text == "equal"
    assert (cells["lbm, 1 step"][column].text, cells["lbm, 1 step"][column].gain) == ("30.00", "")
    assert cells["lbm, 4 steps"][column].text == "–"


def test_another_source_is_shown_again(runs):
    other = metrics(10.0)
    other["source"] = {"psnr": 9.0, "ssim": 0.1}
    lines = table_lines([*runs, RunSummary("other", other)])
    assert [line.label for line in lines].count(SOURCE) == 2
    assert dict(table_cells(lines))["other, 1 step"][0].gain == "+2.00"


def test_the_page_is_well_formed_escaped_and_loads_nothing(runs, tmp_path):
    write_report(tmp_path / "report.html", "A & <B>", runs)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "A &amp; &lt;B&gt;" in text
    assert "“&lt;b&gt;one&lt;/b&gt;”" in text
    assert page.tags.count("table") == 3  # all instructions, and each of two
    assert page.tags.count("svg") == 2  # losses, and PSNR over steps
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
    with pytest.raises(ValueError, match="at least one point"):
        line_chart({"a": []}, "step")


def test_a_folder_without_validation_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no validation/step-"):
        read_run(tmp_path)


def test_the_command_reads_the_last_validation_of_each_run(tmp_path):
    for name, sampler in (("lbm", "BridgeSampler"), ("flow", "FlowSampler")):
        for step, psnr in ((9, 21.0), (400, 25.0)):
            folder = tmp_path / name / "validation" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics(psnr, sampler=sampler)))
            Image.new("RGB", (8, 8)).save(folder / "grid.png")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    assert read_run(tmp_path / "lbm").step == 400
    done = run_script("eval/report.py", tmp_path / "lbm", tmp_path / "flow", "--out", tmp_path / "report.html")
    assert "29.00" in done.stdout  # 25 + 4 steps
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("img") == page.tags.count("svg") == 2


def test_scores_two_adapters_and_reports_on_them(tiny_model_dir, tiny_pairs, tmp_path):
    lbm = write_adapter(tmp_path / "lbm" / "checkpoints" / "step-000001", tiny_model_dir, "lbm", SMALL)
    flow = write_adapter(tmp_path / "flow" / "checkpoints" / "step-000001", tiny_model_dir, "flow", SMALL)
    out = tmp_path / "scores"
    done = run_script(
        *("eval/run.py", "--model", tiny_model_dir, "--adapter", lbm, "--adapter", flow, "--cfg-scale", "1"),
        *("--dataset", tiny_pairs / "validation.json", "--root", tiny_pairs, "--steps", "1,2", "--out", out),
    )
    assert "4 rows cached (4 encoded now)" in done.stderr
    assert "4 rows cached (0 encoded now)" in done.stderr  # the second adapter has the same sizes
    scores = json.loads((out / "metrics.json").read_text())
    assert scores.keys() == {"lbm", "flow"}
    assert scores["lbm"]["source"] == scores["flow"]["source"]
    assert scores["lbm"]["steps_1"] != scores["flow"]["steps_1"]
    for name in scores:
        assert scores[name]["num_rows"] == 4
        assert scores[name]["steps_2"].keys() == {"psnr", "ssim", "psnr_edited", "psnr_background"}
        assert json.loads((out / name / "metrics.json").read_text()) == scores[name]
    page = Page((out / "report.html").read_text())
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "lbm, 2 steps" in done.stdout


def test_a_wrong_dataset_is_one_sentence_and_exit_code_2(tiny_model_dir, tmp_path):
    base = ["eval/run.py", "--model", tiny_model_dir, "--dataset", "nothing.json", "--out", tmp_path / "scores"]
    done = run_script(*base, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "nothing.json" in done.stderr
    assert "Traceback" not in done.stderr
