"""`scripts/bench/edit.py` measures every part of an edit."""

import json

import pytest

from data_prep.model.directory import ModelDirectory
from scripts.bench.edit import Bench, parse_arguments
from tests.commands import run_script

BENCH = "scripts/bench/edit.py"


@pytest.mark.slow
def test_parts_of_an_edit(tmp_path):
    file = tmp_path / "found.json"
    parts = ["--only", "edits,step,switch", "--steps", "6", "--repeat", "1"]
    run_script(BENCH, "--tiny", *parts, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == [
        "flow matching, 6 steps, guidance",
        "bridge, 4 steps",
        "bridge, 1 step",
        "bridge, 4 steps, the next seed",
        "a step, adapter fused",
        "a step, no adapter",
        "a step, adapter beside the weights",
        "first adapter, read and fused",
        "second adapter, read and fused",
        "a change between the two",
    ]
    flow, bridge = rows["flow matching, 6 steps, guidance"], rows["bridge, 4 steps"]
    assert flow["s"] == pytest.approx(sum(flow[f"{part} s"] for part in ("encode", "sample", "decode")))
    assert bridge["speed"] == pytest.approx(flow["s"] / bridge["s"])


def test_one_editor_has_a_model_and_every_request_is_new(tiny_model_dir, tmp_path):
    words = ["--tiny", "--device", "cpu"]
    bench = Bench(parse_arguments(words), ModelDirectory.resolve(tiny_model_dir), tmp_path)
    first = bench.open()
    with first.components.vae():
        pass
    second = bench.open()
    with second.components.vae():
        pass
    assert not first.components.loaded
    bench.close()
    assert not second.components.loaded
    one, other = bench.request("a", 1), bench.request("a", 1)  # nothing of one is kept for the other
    assert one.prompt != other.prompt
    assert one.images[0].tobytes() != other.images[0].tobytes()


@pytest.mark.parametrize(
    ("words", "message"), [((), "--model is missing"), (("--tiny", "--only", "all"), "--only knows")]
)
def test_wrong_options_are_a_sentence(words, message):
    done = run_script(BENCH, *words, check=False)
    assert done.returncode == 2
    assert message in done.stderr
