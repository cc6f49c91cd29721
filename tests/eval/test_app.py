"""The web page in a real browser: one process on the tiny model, driven as a person would."""

import base64
import json
import re
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path

import gradio_client
import numpy as np
import openai
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from data_prep.rows.images import file_digest
from eval.page.attempts import MOST_OF_ONE
from eval.request.provenance import read_png
from tests import browser as driver
from tests import children
from tests.browser import PATIENCE, RESTORED, SIDE, choose, chromium, serving, shot, toast, upload, write_runs
from tests.commands import ROOT, run_script
from tests.pictures import lines, picture, save

pytestmark = pytest.mark.slow

API_KEY = "sk-of-the-page"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def runs(folder, tiny_model_dir) -> Path:
    """A run with a validation and a half-written history, and one that only has a checkpoint."""
    runs = write_runs(folder / "runs", tiny_model_dir)
    history = [{"step": step, "loss": 1 / step, "loss/main": 1 / step, "lr": 1e-4} for step in range(1, 21)]
    text = "".join(json.dumps(line) + "\n" for line in history)
    (runs / "lbm/metrics.jsonl").write_text(text + '{"step": 21, "lo')
    for step in (10, 20):
        validation = runs / f"lbm/validation/step-{step:06d}"
        save(validation / "grid.png", step, (96, 48))
        scores = {"psnr": 20.0 + step, "ssim": 0.5}
        metrics = {"num_rows": 3, "sampler": {"name": "BridgeSampler"}, "source": {"psnr": 19.0, "ssim": 0.4}}
        metrics |= {"steps_1": scores, "seconds_per_edit": {"steps_1": 0.1}, "by_prompt": {}}
        (validation / "metrics.json").write_text(json.dumps(metrics))
    return runs


@pytest.fixture(scope="module")
def source(folder) -> Path:
    """A photograph of the result's size, so that what a mask keeps can be compared pixel by pixel."""
    smooth = picture(5, (5, 5)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    smooth.save(folder / "photo.png")
    return folder / "photo.png"


@pytest.fixture(scope="module")
def app(folder, runs, source, tiny_model_dir):
    """Process and port; uploads of up to 1 MB and 65,536 pixels."""
    study = folder / "study.json"
    study.write_text(json.dumps([{"prompt": "Sharpen it.", "image": "photo.png", "edit_image": "photo.png"}]))
    limits = ("--max-upload-mb", "1", "--max-image-pixels", str(256 * 256))
    places = ("--runs", runs, "--out", folder / "out", "--examples", study, "--adapter", "lbm/step-000002")
    api = ("--api", "--api-key", API_KEY)
    with serving(folder / "app.log", "--model", tiny_model_dir, *places, *limits, *api) as started:
        yield started


@pytest.fixture(scope="module")
def page(browser, app):
    """The page, opened once; what it asks of the network and says on the console is kept on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.requested, page.complaints = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{app[1]}/")
    expect(page.locator("#run")).to_be_visible()
    yield page
    context.close()


def download(page: Page, folder: Path) -> Path:
    with page.expect_download() as caught:
        page.click("#download")
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return path


def results(folder: Path) -> list[Path]:
    return driver.results(folder / "out")


def edit(page: Page, folder: Path, count: int = 1) -> list[Path]:
    return driver.edit(page, folder / "out", count)


def test_without_picture_or_instruction_a_sentence_says_so(page, source):
    page.click("#run")
    expect(page.locator("#status")).to_have_text("Please check: choose a source picture first")
    upload(page, source)
    page.click("#run")
    expect(page.locator("#status")).to_have_text("Please check: write an instruction: what should change?")


def test_ctrl_enter_edits_with_the_adapter_and_the_download_says_how(page, folder, source):
    page.fill("#instruction textarea", "Make it <b>brighter</b>.")
    page.press("#instruction textarea", "Control+Enter")
    expect(page.locator("#result img").first).to_be_visible()
    expect(page.locator("#first-visit")).to_be_hidden()
    (made,) = results(folder)
    path = download(page, folder)
    assert path.read_bytes() == made.read_bytes()
    settings = read_png(path)
    assert (settings["prompt"], settings["seed"], settings["mode"]) == ("Make it <b>brighter</b>.", 0, "edit")
    assert settings["sampler"]["name"] == "BridgeSampler"  # the adapter that the page opened with
    assert settings["images"][0]["name"] == source.name
    page.get_by_text("How it was made").click()
    expect(page.locator("#settings")).to_contain_text("Make it <b>brighter</b>.")  # as text
    shot(page, "edit")


def test_inpainting_changes_what_is_painted_and_no_other_pixel(page, folder, source):
    choose(page, "#mode", "Inpaint:")
    canvas = page.locator("#painting canvas").first
    expect(canvas).to_be_visible()
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("nothing is painted yet")
    page.wait_for_timeout(1000)  # the picture is drawn onto the canvas
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 30, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=10)
    page.mouse.up()
    page.wait_for_timeout(1000)  # the stroke is uploaded
    page.fill("#feather input", "0")
    page.press("#feather input", "Tab")
    page.fill("#instruction textarea", "Make it brighter.")
    shot(page, "paint")
    (made,) = edit(page, folder)
    assert read_png(download(page, folder))["mode"] == "inpaint"
    with Image.open(made) as after, Image.open(source) as before:
        changed = (np.array(after, int) != np.array(before.convert("RGB"), int)).any(axis=2)
    assert changed[SIDE // 2, SIDE // 2 - 2 : SIDE // 2 + 2].any()  # under the stroke
    for strip in (changed[: SIDE // 4], changed[-SIDE // 4 :], changed[:, : SIDE // 8], changed[:, -SIDE // 8 :]):
        assert not strip.any()
    page.click("#another")
    expect(page.locator("#painting canvas")).to_have_count(0)
    page.set_input_files("#source input[type=file]", source)  # shows the paint box again
    expect(page.locator("#painting canvas").first).to_be_visible()
    choose(page, "#mode", "Edit by instruction")
    expect(page.locator("#source img")).to_be_visible()


def test_several_pictures_make_a_gallery_to_choose_from(page, folder):
    choose(page, "#adapter", "flow/step-000002")
    page.get_by_text("Size and sampling").click()
    page.fill("#steps input", "2")
    page.fill("#count input[type=number]", "2")
    page.press("#count input[type=number]", "Tab")
    choose(page, "#shape", "16:9")
    choose(page, "#shape", "As the source")
    page.fill("#seed input", "7")
    edit(page, folder, count=2)
    expect(page.locator("#gallery img")).to_have_count(2)
    frame, *thumbnails = (
        each.bounding_box() for each in [page.locator("#gallery"), *page.locator("#gallery img").all()]
    )
    assert frame
    for each in thumbnails:  # whole
        assert each
        assert frame["y"] <= each["y"] < each["y"] + each["height"] <= frame["y"] + frame["height"]
    assert read_png(download(page, folder))["seed"] == 7
    page.locator("#gallery img").nth(1).click()
    expect(page.locator("#settings tr", has_text="seed").first).to_contain_text("8")
    assert read_png(download(page, folder))["seed"] == 8
    shot(page, "gallery")


def test_cancel_stops_at_the_next_step_and_the_queue_goes_on(page, folder):
    before = len(results(folder))
    page.fill("#count input[type=number]", "1")
    page.press("#count input[type=number]", "Tab")
    page.fill("#steps input", "1000")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text(re.compile(r"Editing: step \d+ of 1,000"))
    expect(page.locator("#status")).to_be_in_viewport(ratio=1)  # also while all that follows is longer than the window
    shot(page, "progress")
    page.click("#cancel")
    toast(page, "It stops at its next step.")
    expect(page.locator("#status")).to_be_hidden()
    page.fill("#steps input", "1")
    edit(page, folder)
    assert len(results(folder)) == before + 1  # the 1000 steps made nothing


def test_a_comparison_tells_no_counts_and_cancels_its_own_edit_alone(page, folder, source):
    before = len(results(folder))
    page.fill("#steps input", "1000")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("Editing")
    page.get_by_role("tab", name="Compare").click()
    upload(page, source, "#compare-source")
    page.fill("#compare-instruction textarea", "Sharpen it.")
    page.fill("#compare-steps input", "1000")
    page.click("#pair")
    expect(page.locator("#compare-status")).to_contain_text("Waiting: 1 before this one")
    page.click("#compare-cancel")
    toast(page, "It left the queue.")
    expect(page.locator("#compare-status")).to_be_hidden()
    shot(page, "left-the-queue")
    page.click("#pair")
    page.get_by_role("tab", name="Edit").click()
    expect(page.locator("#status")).to_contain_text("Editing")  # its cancel button is the other one
    page.click("#cancel")
    toast(page, "It stops at its next step.")
    expect(page.locator("#status")).to_be_hidden()
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#compare-status")).to_contain_text("Making both")
    shot(page, "making-both")
    for _ in range(10):
        shown = page.locator("#compare-status").inner_html()
        assert not re.search(r"step|1,?000|value=|%", shown), shown
        page.wait_for_timeout(100)
    page.click("#compare-cancel")
    toast(page, "It stops at its next step.")
    expect(page.locator("#compare-status")).to_be_hidden()
    page.get_by_role("tab", name="Edit").click()
    page.fill("#steps input", "1")
    assert len(results(folder)) == before


def test_files_that_are_too_large_or_no_picture_are_refused_as_they_arrive(page, folder):
    assert page.complaints == []
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "heavy.png")  # 1.5 MB
    page.set_input_files("#source input[type=file]", folder / "heavy.png")
    toast(page, "exceed the maximum allowed size of 1")
    deadline = time.monotonic() + PATIENCE / 1000
    while len(page.complaints) < 2 and time.monotonic() < deadline:  # of an upload that never began
        page.wait_for_timeout(100)
    assert sorted(text[:23] for text in page.complaints) == ["Failed to load resource", "Response"]
    page.complaints.clear()
    Image.new("RGB", (600, 600)).save(folder / "wide.png")  # few bytes, too many pixels
    (folder / "text.png").write_text("not a picture")
    for name, words in {
        "wide.png": "wide.png has 0.36 megapixels (600x600): at most 0.262 can be opened",
        "text.png": "text.png is not an image that can be read",
    }.items():
        page.set_input_files("#source input[type=file]", folder / name)
        toast(page, words)
        expect(page.locator("#source img")).to_have_count(0)
        page.click("#run")
        expect(page.locator("#status")).to_contain_text("choose a source picture first")
    shot(page, "after-errors")


def test_a_blind_comparison_is_voted_on_once_and_counted(page, folder, source):
    page.get_by_role("tab", name="Compare").click()
    page.click("#draw")
    expect(page.locator("#compare-instruction textarea")).to_have_value("Sharpen it.")
    expect(page.locator("#compare-source img")).to_have_attribute("src", re.compile("photo.png"))
    page.fill("#compare-steps input", "1")
    expect(page.locator("#standings")).to_be_hidden()  # who knows how others voted is not blind any more
    page.click("#pair")
    expect(page.locator("#side-b img")).to_be_visible()
    for name in ("flow/step", "lbm/step"):
        assert name not in page.locator("#sides").inner_html()
    page.click("#vote-a")
    expect(page.locator("#told")).to_contain_text("Thank you. A was")
    expect(page.locator("#vote-a")).to_be_disabled()
    (vote,) = lines(folder / "out/votes.jsonl")
    assert {vote["a"]["name"], vote["b"]["name"]} == {"lbm/step-000002", "flow/step-000002"}
    assert (vote["choice"], vote["prompt"], vote["source"]) == ("A", "Sharpen it.", file_digest(source))  # untouched
    assert [vote[side]["steps"] for side in "ab"] == [1, 1]
    assert vote["images"][0] != vote["images"][1]
    assert f"A was {vote['a']['name']}" in page.locator("#told").inner_text()
    page.get_by_text("Results so far").click()
    row = page.locator("#standings tbody tr")
    expect(row).to_contain_text(re.compile(rf"{vote['a']['name']}.*100%\s*\(21% – 100%\)", re.DOTALL))  # Wilson, 1 of 1
    shot(page, "compare")


def test_a_run_has_curves_numbers_and_pictures_by_step(page):
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#run-charts polyline").first).to_be_visible()
    expect(page.locator("#run-summary")).to_contain_text("20")  # the half-written line 21 is not there
    expect(page.locator("#run-scores")).to_contain_text("40.00")
    expect(page.locator("#run-grid img")).to_be_visible()
    latest = page.locator("#run-grid img").get_attribute("src")
    choose(page, "#run-step", "10")
    expect(page.locator("#run-scores")).to_contain_text("30.00")
    expect(page.locator("#run-grid img")).not_to_have_attribute("src", latest or "")
    shot(page, "runs")


def test_nothing_outside_of_what_the_page_shows_is_served(app, folder, tiny_model_dir, page):
    base = f"http://127.0.0.1:{app[1]}"
    (folder / "secret.txt").write_text("secret")
    forbidden = ["/etc/passwd", ROOT / "pyproject.toml", tiny_model_dir / "vae/config.json", folder / "secret.txt"]
    forbidden += [f"{folder}/out/results/../../secret.txt", f"{folder}/out/results/%2e%2e/%2e%2e/secret.txt"]
    forbidden += [folder / "out/votes.jsonl", folder / "runs/lbm/metrics.jsonl", "pyproject.toml", ROOT / ".git/config"]
    forbidden += ["http://127.0.0.1:1/x", "//127.0.0.1:1/x", "file:///etc/passwd"]
    for path in forbidden:
        for route in ("/gradio_api/file=", "/file="):
            assert status(f"{base}{route}{path}") in (403, 404), path
    assert status(f"{base}/gradio_api/file={results(folder)[0]}") == 200
    for path in ("/docs", "/redoc", "/monitoring"):
        assert status(base + path) in (403, 404), path
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    for size, answer in ((2**18, 200), (2**21, 413)):  # also for who does not come by a browser
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        assert status(urllib.request.Request(f"{base}/gradio_api/upload", part % bytes(size), kind)) == answer


def test_the_api_beside_the_page_answers_openai_s_client(app, folder, source, tiny_model_dir):
    """More of it is in tests/eval/page/test_api.py."""
    base = f"http://127.0.0.1:{app[1]}"
    with openai.OpenAI(base_url=f"{base}/v1", api_key=API_KEY, max_retries=0, timeout=children.PATIENCE) as client:
        names = [each.id for each in client.models.list().data]
        assert names == [tiny_model_dir.name, "flow/step-000002", "lbm/step-000002"]
        answer = client.images.edit(image=source, prompt="Sharpen it.", extra_body={"steps": 1, "seed": 3})
    made = folder / "api.png"
    made.write_bytes(base64.b64decode(answer.data[0].b64_json))
    settings = read_png(made)
    assert (settings["model"], settings["adapters"][0]["path"]) == (tiny_model_dir.name, "lbm/step-000002")
    assert (settings["seed"], settings["images"][0]["digest"]) == (3, file_digest(source))
    assert status(f"{base}/v1/models") == 401
    assert status(f"{base}/health") == 200


def test_the_page_s_limits_hold_for_who_calls_it_without_the_page(app, source):
    """By Gradio's client, which finds nothing to call, and by what a browser sends, in which anything may stand."""
    base = f"http://127.0.0.1:{app[1]}"
    client = gradio_client.Client(base, verbose=False)
    assert client.view_api(print_info=False, return_format="dict")["named_endpoints"] == {}
    assert {each.api_visibility for each in client.endpoints.values() if each.is_valid} == set()
    with urllib.request.urlopen(f"{base}/config", timeout=30) as response:
        config = json.load(response)
    numbers = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
    handlers = {tuple(target): each for each in config["dependencies"] for target in each["targets"]}
    values = {each["id"]: each["props"].get("value") for each in config["components"]}
    uploaded = {"path": upload_file(base, source), "meta": {"_type": "gradio.FileData"}}

    def told(button: str, **changes) -> str:
        handler = handlers[numbers[button], "click"]
        own = values | {numbers[name.replace("_", "-")]: value for name, value in changes.items()}
        return call(base, handler["id"], [own[number] for number in handler["inputs"]])

    edit = {"source": uploaded, "instruction": "Sharpen it."}
    pair = {"compare_source": uploaded, "compare_instruction": "Sharpen it."}
    pair |= {"first": "lbm/step-000002", "second": "flow/step-000002"}
    long = "x" * 10_001
    assert "prompt has 10,001 characters" in told("run", **edit | {"instruction": long})
    assert "negative_prompt has 10,001 characters" in told("run", **edit, negative_prompt=long)
    assert "prompt has 10,001 characters" in told("pair", **pair | {"compare_instruction": long})
    # The other numbers' ends are Gradio's to check, with a traceback in the log.
    assert "steps must be in [1, 1000], got 1001" in told("pair", **pair, compare_steps=1001)


def upload_file(base: str, path: Path) -> str:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="photo.png"\r\n\r\n%s\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{base}/gradio_api/upload", part % path.read_bytes(), kind)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)[0]


def call(base: str, handler: int, data: list) -> str:
    """What a handler of the page answers, joined by hand as its JavaScript does."""
    asked = {"fn_index": handler, "data": data, "session_hash": "by-hand"}
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}/gradio_api/queue/join", json.dumps(asked).encode(), kind)
    urllib.request.urlopen(request, timeout=30).close()
    url = f"{base}/gradio_api/queue/data?session_hash=by-hand"
    with urllib.request.urlopen(url, timeout=children.PATIENCE) as stream:
        for line in stream:
            event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                return json.dumps(event["output"])
    raise AssertionError("no answer")


def test_every_handler_goes_through_the_queue_where_its_errors_are_shown(app):
    with urllib.request.urlopen(f"http://127.0.0.1:{app[1]}/config", timeout=30) as response:
        handlers = json.load(response)["dependencies"]
    silent = [handler["targets"] for handler in handlers if handler["backend_fn"] and handler["queue"] is False]
    assert len(handlers) > 15
    assert [event for targets in silent for _, event in targets if event != "unload"] == []


def status(url: str | urllib.request.Request, visitor: urllib.request.OpenerDirector | None = None) -> int:
    try:
        with (visitor or urllib.request.build_opener()).open(url, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_asks_nobody_else_and_complains_of_nothing(page, app):
    """After all of the above."""
    own = (f"http://127.0.0.1:{app[1]}/", "data:", "blob:")
    assert [url for url in page.requested if not url.startswith(own)] == []
    assert page.complaints == []


def test_dark_and_narrow(browser, app):
    """With the votes of the comparison above."""
    context = browser.new_context(viewport={"width": 420, "height": 900}, color_scheme="dark")
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{app[1]}/", timeout=PATIENCE)
    expect(page.locator("#run")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420  # nothing sticks out
    assert page.evaluate("document.body.classList.contains('dark')")
    shot(page, "dark-narrow")
    page.get_by_role("tab", name="Compare").click()
    page.get_by_text("Results so far").click()
    bar = page.locator("#standings .interval")
    expect(bar).to_be_visible()
    bar.scroll_into_view_if_needed()
    shot(page, "dark-narrow-standings")
    table = page.locator("#results-so-far").bounding_box()
    ends = bar.bounding_box()
    assert table
    assert ends
    assert ends["width"] > 40
    assert ends["x"] + ends["width"] <= table["x"] + table["width"]  # not cut off
    context.close()


def test_a_page_with_a_password_shows_nothing_without_it(browser, tiny_model_dir, folder):
    shown = save(folder / "locked/results/made.png")
    arguments = ("--model", tiny_model_dir, "--out", folder / "locked", "--auth", "anna:se:cret", "--preload")
    with serving(folder / "locked.log", *arguments) as (_, port):
        base = f"http://127.0.0.1:{port}"
        visitor = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        paths = ("/config", "/gradio_api/info", f"/gradio_api/file={shown}")
        assert [status(base + path, visitor) for path in paths] == [401, 401, 401]
        for password, answer in (("wrong", 400), ("se:cret", 200)):
            form = urllib.parse.urlencode({"username": "anna", "password": password}).encode()
            assert status(urllib.request.Request(f"{base}/login", form), visitor) == answer
        assert [status(base + path, visitor) for path in (paths[0], paths[2])] == [200, 200]
        assert "se:cret" not in kept_after_a_login(browser, base)
        form = urllib.parse.urlencode({"username": "anna", "password": "guessed"}).encode()
        guess = urllib.request.Request(f"{base}/login", form)
        assert [status(guess) for _ in range(MOST_OF_ONE)] == [400] * (MOST_OF_ONE - 1) + [429]  # one was above
    assert re.search(r"^loaded \S+ in \d+\.\d s$", (folder / "locked.log").read_text(), re.MULTILINE)


def kept_after_a_login(browser: Browser, base: str) -> str:
    """All that a browser keeps for its scripts of somebody who logged in and filled in the form."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.add_init_script(RESTORED)
    page.goto(base)
    page.locator("input").first.fill("anna")
    page.fill("input[type=password]", "se:cret")
    page.get_by_role("button", name="Login").click()
    page.fill("#instruction textarea", "Sharpen it.")
    page.wait_for_function("localStorage.getItem('edit-form')")
    page.reload()
    expect(page.locator("#instruction textarea")).to_have_value("Sharpen it.")
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, window.restored])")
    context.close()
    assert "Sharpen it." in kept  # decrypted
    return kept


def test_a_taken_port_is_a_sentence_and_ctrl_c_ends_cleanly(app, tiny_model_dir, folder):
    process, port = app
    arguments = ("eval/app.py", "--model", tiny_model_dir, "--out", folder / "other", "--port", str(port))
    done = run_script(*arguments, check=False)
    assert done.returncode == 2
    assert f"error: cannot serve on 127.0.0.1 port {port} (Address already in use): choose another" in done.stderr
    assert "Traceback" not in done.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(children.PATIENCE) == 0
    log = (folder / "app.log").read_text()
    assert log.splitlines()[-1] == "stopped"
    assert "Traceback" not in log


def test_it_is_not_opened_to_others_without_a_password(tiny_model_dir, folder):
    for exposed in (["--host", "0.0.0.0"], ["--share"]):
        arguments = ("eval/app.py", "--model", tiny_model_dir, "--out", folder / "other", *exposed)
        done = run_script(*arguments, check=False)
        assert done.returncode == 2
        assert "give --auth USER:PASSWORD too" in done.stderr
        assert "Traceback" not in done.stderr
