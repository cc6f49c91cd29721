"""What a person meets on the page, on a desk and on a telephone: one server for both."""

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from eval.request.provenance import read_png
from tests import children
from tests.browser import (
    PATIENCE,
    RESTORED,
    choose,
    chromium,
    edit,
    serving,
    shot,
    toast,
    upload,
    write_runs,
)
from tests.pictures import picture

pytestmark = pytest.mark.slow

WIDTHS = {
    "wide": {"viewport": {"width": 1400, "height": 1000}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}
PIXELS = 256 * 256
"""That an upload keeps."""
FORMER = re.compile(r"Look again|Take another|[Ss]oft rim|what suits|drawn\.|New seed")
CONTRAST = """
() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(srgb") ? 255 : 1;
    return [...found.slice(0, 3).map((v) => scale * v), found[3] ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const ratio = (text, below) => {
    const [high, low] = [light(over(text, below)), light(below)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const add = (element, words, color) => found.push([ratio(parse(color), ground(element)), words.trim().slice(0, 60)]);
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest("button:disabled, svg, option, .toast-wrap")) continue;
    const own = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (own.length && element.getBoundingClientRect().height > 1) add(element, own[0].data, getComputedStyle(element).color);
    if (!element.placeholder || element.value) continue;
    add(element, element.placeholder, getComputedStyle(element, "::placeholder").color);
  }
  return found;
}
"""
"""[contrast by WCAG's formula of relative luminance, text] of all text that is to be seen."""

UNCOVERED = """
(place) => {
  const box = document.querySelector(place).getBoundingClientRect();
  const at = (share) => document.elementFromPoint(box.left + share * box.width, box.top + box.height / 2);
  return [0.1, 0.5, 0.9].every((share) => at(share).closest(place));
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("visits")


@pytest.fixture(scope="module")
def arguments(folder, tiny_model_dir) -> list[str | Path]:
    """The server's command line."""
    runs, out = write_runs(folder / "runs", tiny_model_dir), folder / "out"
    limits = ("--max-image-pixels", str(PIXELS))
    return ["--model", tiny_model_dir, "--runs", runs, "--out", out, "--adapter", "lbm/step-000002", *limits]


@pytest.fixture(scope="module")
def server(folder, arguments) -> Iterator[tuple[Popen, int]]:
    """Process and port."""
    with serving(folder / "app.log", *arguments) as started:
        yield started


@pytest.fixture(scope="module")
def port(server) -> int:
    return server[1]


def visit(context: BrowserContext, port: int, scheme: str = "light") -> Page:
    """The page, ready: what the server sends when it opens has come."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    with page.expect_response(lambda response: "/queue/data" in response.url):
        page.goto(f"http://127.0.0.1:{port}/")
    expect(page.locator("#run")).to_be_visible()
    return page


@pytest.fixture(scope="module", params=WIDTHS)
def page(request, browser, port) -> Iterator[Page]:
    """A browser that has never been here, of that width."""
    context = browser.new_context(**WIDTHS[request.param])
    page = visit(context, port)
    page.width = request.param
    yield page
    context.close()


@pytest.fixture(scope="module")
def source(folder) -> Path:
    """Stripes, so that it can be told whether they are seen through paint."""
    stripes = np.where(np.arange(256)[None, :, None] // 16 % 2, 230, 40) * np.ones((192, 1, 3))
    Image.fromarray(stripes.astype(np.uint8)).save(folder / "stripes.png")
    return folder / "stripes.png"


def open_sampling(page: Page) -> None:
    """The folded part of the settings."""
    if not page.locator("#steps").is_visible():
        page.get_by_text("Size and sampling").click()
    expect(page.locator("#steps")).to_be_visible()


def top(page: Page, place: str) -> float:
    """Where it begins on the whole page, in pixels."""
    box = page.locator(place).bounding_box()
    assert box
    return box["y"] + page.evaluate("scrollY")


def test_a_first_visit_shows_an_example_that_one_click_runs(page, folder):
    expect(page.locator("#first-visit").first).to_be_visible()
    expect(page.locator("#first-visit img")).to_be_visible()
    shot(page, f"first-visit-{page.width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[page.width]["viewport"]["width"]
    (made,) = edit(page, folder / "out", button="#run-example")
    settings = read_png(made)
    assert (settings["prompt"], settings["images"][0]["name"]) == ("Make the cup blue.", "coffee.png")
    expect(page.locator("#first-visit").first).to_be_hidden()
    expect(page.locator("#result")).to_be_in_viewport()
    shot(page, f"example-{page.width}")


def test_the_result_stands_before_the_settings_and_edit_shows_it(page, folder):
    """While an edit runs, its steps are counted in full and nothing is said in per cent."""
    hint = page.evaluate("getComputedStyle(document.querySelector('#run'), '::after').content")
    assert ("Ctrl" in hint) == (page.width == "wide")
    assert page.locator("#run").inner_text() == "Edit"
    if page.width == "phone":
        assert top(page, "#run") < top(page, "#outcome") < top(page, "#adapter")
    else:
        assert top(page, "#outcome") < top(page, "#run") < top(page, "#adapter")
    open_sampling(page)
    page.fill("#steps input", "1000")
    page.locator("#run").scroll_into_view_if_needed()
    page.click("#run")
    status = page.locator("#status")
    expect(status).to_have_text(re.compile(r"^\s*Editing: step \d+ of 1,000, \d+ (s|min) left\s*$"))
    expect(status).to_be_in_viewport(ratio=1)
    expect(page.locator("#result")).to_be_in_viewport()
    assert page.evaluate(UNCOVERED, "#status")  # by a message, as that of the example's size
    assert top(page, "#status") < top(page, "#result")
    if page.width == "phone":
        assert page.locator("#status").bounding_box()["y"] < 60  # it has been scrolled to
    assert 0 < float(status.locator("progress").get_attribute("value")) < 1000
    shot(page, f"progress-{page.width}")
    page.locator("#cancel").click()
    expect(status).to_be_hidden()
    page.fill("#steps input", "1")
    assert not re.search(r"\d%|\d\.\dk", page.inner_text("body"))


def test_an_error_stays_until_the_next_result(page, folder, source):
    text = page.input_value("#instruction textarea")
    page.fill("#instruction textarea", "")
    page.click("#run")
    problem = page.locator("#status .problem")
    expect(problem).to_have_text("Please check: write an instruction: what should change?")
    expect(problem).to_be_in_viewport()
    if page.width == "wide":
        page.wait_for_timeout(11_000)  # Gradio's own messages go after ten seconds
    expect(problem).to_be_visible()
    shot(page, f"error-{page.width}")
    (source.parent / "text.png").write_text("not a picture")
    page.set_input_files("#source input[type=file]", source.parent / "text.png")
    refused = page.locator(".toast-body", has_text="text.png is not an image that can be read")
    expect(refused).to_be_visible()
    upload(page, source)
    page.fill("#instruction textarea", text)
    edit(page, folder / "out")
    expect(problem).to_have_count(0)
    expect(refused).to_have_count(0)
    shot(page, f"after-error-{page.width}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page, scheme, port):
    """A contrast of 4.5 and more, by the colours that are drawn."""
    seen = visit(page.context, port, scheme)
    assert seen.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    open_sampling(seen)
    texts = []
    for tab, place in (("Edit", "#run"), ("Compare", "#pair"), ("Runs", "#runs-refresh")):
        seen.get_by_role("tab", name=tab).click()
        expect(seen.locator(place)).to_be_visible()
        seen.wait_for_timeout(500)  # colours fade in
        texts += seen.evaluate(CONTRAST)
        shot(seen, f"{tab.lower()}-{scheme}-{page.width}")
    assert len(texts) > 40
    assert any("Automatic:" in words for _, words in texts)  # help
    assert any(words == "automatic" for _, words in texts)  # a placeholder
    assert [(round(ratio, 2), words) for ratio, words in texts if ratio < 4.5] == []
    seen.close()


def test_words_are_the_usual_ones(page, source):
    upload(page, source)
    open_sampling(page)
    choose(page, "#mode", "Inpaint:")
    expect(page.locator("#another")).to_have_text("Replace the picture")
    expect(page.locator("#feather")).to_contain_text("Feather")
    expect(page.locator("#refresh")).to_have_text("Refresh")
    expect(page.locator("#new-seed")).to_have_text("Random")
    assert page.locator("#cfg-scale input").get_attribute("placeholder") == "automatic"
    assert page.locator("#sampler input").input_value() == "automatic"
    texts = [page.inner_text("body")]
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#compare-seed")).to_contain_text("-1: random.")
    texts.append(page.inner_text("body"))
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#runs-refresh")).to_have_text("Refresh")
    texts.append(page.inner_text("body"))
    assert [FORMER.findall(text) for text in texts] == [[], [], []]
    page.get_by_role("tab", name="Edit").click()


def test_what_is_painted_over_is_still_seen(page):
    canvas = page.locator("#painting canvas").first
    expect(canvas).to_be_visible()
    page.wait_for_timeout(1000)  # the picture is drawn onto the canvas
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    clip = {"x": middle[0] - 40, "y": middle[1] - 6, "width": 80, "height": 12}
    before = pixels(page, clip)
    page.mouse.move(middle[0] - 60, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=10)
    page.mouse.up()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.wait_for_timeout(1000)
    after = pixels(page, clip)
    shot(page, f"paint-{page.width}")
    assert np.abs(after - before).max() > 60  # there is paint
    assert after[..., 0].mean() > after[..., 2].mean() + 40  # red
    share = after[..., 1].std() / before[..., 1].std()  # of the stripes' contrast
    assert 0.3 < share < 0.7
    choose(page, "#mode", "Edit by instruction")


def pixels(page: Page, clip: dict) -> np.ndarray:
    """What the browser draws there."""
    with Image.open(BytesIO(page.screenshot(clip=clip))) as drawn:
        return np.asarray(drawn.convert("RGB"), dtype=int)


def test_a_large_photograph_is_scaled_as_it_arrives_and_a_bomb_is_refused(page, folder):
    photograph = picture(1, (50, 40)).resize((1000, 800))
    photograph.save(folder / "photograph.jpg")  # 12 times what is kept
    upload(page, folder / "photograph.jpg")
    page.wait_for_function("document.querySelector('#source img')?.naturalWidth === 250")  # 50,000 pixels
    (made,) = edit(page, folder / "out")
    assert read_png(made)["images"][0]["name"] == "photograph.jpg"
    Image.new("RGB", (8000, 8000)).save(folder / "bomb.png")  # 200 MB when decoded
    page.set_input_files("#source input[type=file]", folder / "bomb.png")
    toast(page, "bomb.png has 64 megapixels (8000x8000): at most 0.262 can be opened; save it smaller")
    expect(page.locator("#source img")).to_have_count(0)
    upload(page, folder / "photograph.jpg")


def test_before_and_after_are_zoomed_together(page):
    transforms = lambda: page.eval_on_selector_all("#result img", "all => all.map((one) => one.style.transform)")  # noqa: E731
    page.locator("#result").scroll_into_view_if_needed()
    enlarge(page, "#result img")
    page.wait_for_timeout(500)
    first, second = transforms()
    assert first == second
    assert scale_of(first) > 1.2
    shot(page, f"zoom-{page.width}")


def test_both_sides_of_a_comparison_are_zoomed_together(page, source):
    page.get_by_role("tab", name="Compare").click()
    upload(page, source, "#compare-source")
    page.fill("#compare-instruction textarea", "Sharpen it.")
    page.fill("#compare-steps input", "1")
    page.click("#pair")
    expect(page.locator("#side-b img")).to_be_visible()
    expect(page.locator("#compare-status")).to_be_hidden()
    sides = lambda: page.eval_on_selector_all("#sides img", "all => all.map((one) => one.style.transform)")  # noqa: E731
    page.locator("#sides").scroll_into_view_if_needed()
    enlarge(page, "#side-a img")
    first, second = sides()
    assert first == second
    assert scale_of(first) > 1.2
    shot(page, f"compare-zoom-{page.width}")
    page.fill("#compare-seed input", "3")
    page.click("#pair")  # another pair is whole again
    page.wait_for_function(
        "[...document.querySelectorAll('#sides img')].every((one) => !/scale\\((?!1\\))/.test(one.style.transform))"
    )
    page.get_by_role("tab", name="Edit").click()


def enlarge(page: Page, place: str) -> None:
    """With the wheel, or with two fingers."""
    box = page.locator(place).first.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 3  # the slider's handle is in the middle
    if page.width == "wide":
        page.mouse.move(x, y)
        for _ in range(8):
            page.mouse.wheel(0, -100)
        return
    devtools = page.context.new_cdp_session(page)
    for kind, away in (("touchStart", 10), ("touchMove", 15), ("touchMove", 25), ("touchMove", 40), ("touchEnd", None)):
        points = [] if away is None else [{"x": x - away, "y": y, "id": 0}, {"x": x + away, "y": y, "id": 1}]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    devtools.detach()


def scale_of(transform: str) -> float:
    found = re.search(r"scale\(([\d.]+)\)", transform)
    assert found, transform
    return float(found[1])


def test_the_form_survives_a_restart_of_the_server(browser, server, folder, arguments, source):
    """The last test of this file: it ends the server that all others share."""
    process, port = server
    context = browser.new_context(**WIDTHS["wide"])
    page = visit(context, port)
    open_sampling(page)
    choose(page, "#mode", "Image to image")
    choose(page, "#adapter", "flow/step-000002")
    choose(page, "#sampler", "heun")
    page.fill("#instruction textarea", "Make it <b>brighter</b>.")
    for field, value in {"strength": "0.3", "steps": "3", "seed": "11"}.items():
        page.fill(f"#{field} input[type=number]", value)
        page.press(f"#{field} input[type=number]", "Tab")
    page.wait_for_timeout(1000)  # the form is stored
    process.kill()
    process.wait(children.PATIENCE)
    page.add_init_script(RESTORED)
    with serving(folder / "again.log", *arguments, port=port):
        page.reload()
        expect(page.locator("#instruction textarea")).to_have_value("Make it <b>brighter</b>.")
        expect(page.locator("#mode input")).to_have_value(re.compile("Image to image"))
        expect(page.locator("#adapter input")).to_have_value("flow/step-000002")
        open_sampling(page)
        for field, value in {"strength": "0.3", "steps": "3", "seed": "11", "cfg-scale": ""}.items():
            expect(page.locator(f"#{field} input[type=number]")).to_have_value(value)
        expect(page.locator("#sampler input")).to_have_value("heun")
        expect(page.locator("#first-visit")).to_be_hidden()
        shot(page, "after-restart")
        upload(page, source)
        (made,) = edit(page, folder / "out")
        settings = read_png(made)
        assert (settings["mode"], settings["prompt"]) == ("img2img", "Make it <b>brighter</b>.")
        assert (settings["seed"], settings["steps"]) == (11, 3)
        assert (settings["sampler"]["solver"], settings["sampler"]["strength"]) == ("heun", 0.3)
        assert page.evaluate("Object.keys(localStorage)") == ["edit-form"]
        assert page.evaluate("[sessionStorage.length, document.cookie]") == [0, ""]
        kept = json.loads(page.evaluate("window.restored"))
        assert kept["prompt"] == "Make it <b>brighter</b>."
        assert not kept.keys() & {"source", "painting", "reference_1", "reference_2"}
    context.close()
