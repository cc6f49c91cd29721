"""The API with OpenAI's own client, over a socket, on the tiny model."""

import asyncio
import base64
import errno
import io
import json
import re
import shlex
import threading
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
import torch
import typer
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request

from data_prep.errors import InputError
from data_prep.model.geometry import Geometry
from data_prep.rows.images import file_digest, open_image
from eval.bases.auto import open_editor
from eval.page.api.body import read_body
from eval.page.api.refusals import Refusal, without_paths
from eval.page.api.routes import Api, api_routes
from eval.page.attempts import KNOWN, Attempts
from eval.page.limits import Limits, api_key_for
from eval.page.studio import Studio
from eval.request.knobs import AdapterUse
from eval.request.placement import Placement
from eval.request.provenance import model_name, read_png
from eval.request.request import KNOBS, EditRequest
from tests.adapters import write_adapter
from tests.children import PATIENCE, run, wait_until
from tests.commands import ROOT
from tests.pictures import save

SIDE = 64
SMALL = Geometry(max_pixels=SIDE * SIDE, vision_pixels=56 * 56)
KEY = "sk-of-this-test"
LBM, FLOW = "lbm/step-000002", "flow/step-000002"
NEVER = 1_000_000
"""Wrong attempts that no test reaches."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory, tiny_model_dir) -> Studio:
    """On the tiny model, with two adapters; pictures of up to 100,000 pixels and files of up to 1 MB."""
    folder = tmp_path_factory.mktemp("api")
    write_adapter(folder / "runs/flow/checkpoints/step-000002", tiny_model_dir, "flow", SMALL)
    write_adapter(folder / "runs/lbm/checkpoints/step-000002", tiny_model_dir, "lbm", SMALL, bridge_noise=0.0)
    editor = open_editor(str(tiny_model_dir), Placement(dtype=torch.float32), SMALL)
    limits = Limits(max_upload_mb=1, max_image_pixels=100_000, max_count=3)
    return Studio(editor, "tiny", folder / "out", folder / "runs", limits, first_adapter=LBM)


@contextmanager
def serving(api: Api):
    """Yields the address."""
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=api_routes(api)), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


@pytest.fixture(scope="module")
def address(studio):
    with serving(Api(studio, KEY, "tiny", Attempts(of_one=NEVER, of_all=NEVER))) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "photo.png", 3, (SIDE, SIDE))


def mask_of(path, box, size=(SIDE, SIDE)):
    """OpenAI's: transparent in the box."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), box)
    mask.save(path)
    return path


def opened(picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.b64_json))).convert("RGB")


def test_an_edit_is_the_one_that_its_request_makes(client, studio, tmp_path, photo):
    other = save(tmp_path / "other.png", 4, (SIDE, SIDE))
    answer = client.images.edit(
        image=[photo, other],
        prompt="Sharpen it.",
        model=FLOW,
        n=2,
        extra_body={"seed": 7, "steps": 2, "cfg_scale": 2.5},
    )
    use = AdapterUse(next(each.path for each in studio.adapters() if each.name == FLOW))
    request = EditRequest(
        "Sharpen it.", [open_image(photo), open_image(other)], adapters=[use], seed=7, steps=2, cfg_scale=2.5, count=2
    )
    expected = studio.editor.edit(request)
    assert [opened(each).tobytes() for each in answer.data] == [each.image.tobytes() for each in expected]
    assert [each.seed for each in answer.data] == [7, 8]
    assert (answer.output_format, answer.size) == ("png", f"{SIDE}x{SIDE}")


def test_files_and_answers_name_models_and_digests_and_no_place(client, studio, tiny_model_dir, tmp_path, photo):
    answer = client.images.edit(image=photo, prompt="Sharpen it.", extra_body={"steps": 1})
    (tmp_path / "made.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    made = read_png(tmp_path / "made.png")
    use = AdapterUse(next(each.path for each in studio.adapters() if each.name == LBM))
    (before,) = studio.editor.edit(EditRequest("Sharpen it.", [open_image(photo)], adapters=[use], steps=1))
    assert made["adapters"] == [before.settings["adapters"][0] | {"path": LBM}]  # the one that the page opens with
    assert made["model"] == tiny_model_dir.name
    assert made["model_fingerprint"] == before.settings["model_fingerprint"]
    assert made["images"] == [{"name": "photo.png", "digest": file_digest(photo)}]
    assert answer.data[0].settings == {name: value for name, value in made.items() if name != "images"}
    said = answer.model_dump_json() + json.dumps(made)
    assert [place for place in (tmp_path, tiny_model_dir, studio.runs, "/tmp") if str(place) in said] == []


def test_a_mask_is_edited_where_it_is_transparent(client, tmp_path, photo):
    mask = mask_of(tmp_path / "mask.png", (0, 0, SIDE, SIDE // 2))
    answer = client.images.edit(
        image=photo, mask=mask, prompt="Sharpen it.", model="tiny", extra_body={"steps": 2, "feather": 0}
    )
    change = np.abs(np.array(opened(answer.data[0]), int) - np.array(open_image(photo), int)).max(axis=2)
    assert change[SIDE // 2 :].max() == 0
    assert change[: SIDE // 2].max() > 8
    assert answer.data[0].settings["mode"] == "inpaint"


def test_every_knob_of_the_table_is_taken(client, studio, photo, monkeypatch):
    """As a field of the form, several as a list; what comes of it is the request's own affair."""
    asked = []

    def recorded(request, on_progress=None):
        asked.append(request)
        raise InputError("seen")

    monkeypatch.setattr(studio.editor, "edit", recorded)
    given = {"mode": "control", "control": ["canny:0.5", "lines"], "adapter": [f"{FLOW}:0.5", FLOW]}
    given |= {"negative_prompt": "grey", "steps": 3, "cfg_scale": 1.5, "sampler": "flow", "seed": 9, "aspect": "16:9"}
    with pytest.raises(openai.UnprocessableEntityError, match="seen"):
        client.images.edit(image=photo, prompt="Sharpen it.", extra_body=given)
    with pytest.raises(openai.UnprocessableEntityError, match="seen"):
        client.images.edit(
            image=photo, prompt="x", size="96x64", extra_body={"mode": "focus", "focus": "0.5,0.5,0.3", "strength": 1}
        )
    first, second = asked
    assert [(each.kind, each.strength) for each in first.controls] == [("canny", 0.5), ("lines", 1.0)]
    assert [(each.path.parent.parent.name, each.weight) for each in first.adapters] == [("flow", 0.5), ("flow", 1.0)]
    assert (first.mode, first.negative_prompt, first.steps, first.cfg_scale) == ("control", "grey", 3, 1.5)
    assert (first.sampler, first.seed, first.aspect) == ("flow", 9, "16:9")
    assert (second.size, second.focus.radius, second.strength) == ((64, 96), 0.3, 1.0)


@pytest.mark.parametrize(
    ("given", "status", "param", "words"),
    [
        ({"prompt": "x" * 10_001}, 422, "prompt", "prompt has 10,001 characters, at most 10,000"),
        ({"prompt": "x" * 70_000}, 413, None, "exceeded maximum size"),
        ({"prompt": " "}, 422, "mode", "needs an instruction"),
        ({"n": 4}, 422, "n", "n must be from 1 to 3, got 4"),
        ({"n": 0}, 422, "n", "n must be from 1 to 3, got 0"),
        ({"size": "100x64"}, 422, "size", "multiples of 32, got 100x64"),
        ({"size": "large"}, 400, "size", "must look like 768x512"),
        ({"response_format": "url"}, 400, "response_format", "must be b64_json, got 'url'"),
        ({"output_format": "webp"}, 400, "output_format", "must be png"),
        ({"model": "gpt-image-2"}, 404, "model", "there is no model 'gpt-image-2'"),
        ({"model": "../../etc"}, 404, "model", "there is no model"),
        ({"extra_body": {"adapter": "/etc/passwd"}}, 404, "adapter", "there is no adapter"),
        ({"model": LBM, "extra_body": {"adapter": FLOW}}, 400, "adapter", "both name an adapter"),
        ({"extra_body": {"adapter": [LBM, FLOW]}}, 422, None, "different objectives"),
        ({"extra_body": {"steps": 1001}}, 422, "steps", r"steps must be in \[1, 1000\], got 1001"),
        ({"extra_body": {"steps": "many"}}, 400, "steps", "must be a whole number, got 'many'"),
        ({"extra_body": {"cfg_scale": "nan"}}, 422, "cfg_scale", "cfg_scale must be in"),
        ({"extra_body": {"step": 4}}, 400, "step", "there is no parameter step"),
        ({"extra_body": {"count": 2}, "n": 2}, 400, "n", "n and count are the same"),
        ({"extra_body": {"seed": [1, 2]}}, 400, "seed", "seed is given 2 times"),
        ({"extra_body": {"control": "fog"}}, 422, "control", "a control is one of"),
        ({"extra_body": {"mode": "inpaint"}}, 422, "mode", "needs a mask"),
        ({"extra_body": {"feather": 4}}, 422, "feather", "mode=edit takes none"),
        ({"extra_body": {"geometry": "nope"}}, 422, "geometry", "geometry must be one of own, upstream, got 'nope'"),
    ],
)
def test_a_wrong_request_is_answered_in_words(client, photo, given, status, param, words):
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.images.edit(**{"image": photo, "prompt": "Sharpen it.", **given})
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "make", "status", "words"),
    [
        ("image", lambda path: path.write_text("not a picture"), 400, "text.png is not an image"),
        ("image", lambda path: Image.new("RGB", (400, 300)).save(path), 413, r"0\.1 megapixels \(400x300\)"),
        ("image", lambda path: path.write_bytes(bytes(2**20 + 1)), 413, "more than 1 MB"),
        ("image", lambda path: path.write_bytes(bytes(9 * 2**20)), 413, "more than 8 MB"),
        ("mask", lambda path: Image.new("L", (SIDE, SIDE)).save(path), 422, "transparent nowhere"),
        ("mask", lambda path: mask_of(path, (0, 0, 9, 9), (SIDE, 32)), 400, "must have the first image's size"),
    ],
)
def test_a_file_that_cannot_be_used_is_answered_in_words(client, tmp_path, photo, name, make, status, words):
    make(tmp_path / "text.png")
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.images.edit(**{"image": photo, "prompt": "Sharpen it.", name: tmp_path / "text.png"})
    assert caught.value.status_code == status
    assert str(tmp_path) not in str(caught.value)


def test_a_body_of_unknown_length_is_cut_off_and_other_forms_are_refused(address):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(9):
            yield bytes(2**20)

    with httpx2.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        url = f"{address}/v1/images/edits"
        large = client.post(url, content=endless(), headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
        wrong = [client.post(url, json={"prompt": "x"}), client.post(url, data={"prompt": "x"})]
        wrong.append(client.post(url, data={"prompt": "x"}, files={"other": b"x"}))
        wrong.append(client.post(url, data={}, files={"image": b"x"}))
        wrong.append(client.post(url, data={"prompt": "x"}, files={"mask": b"x"}))
        assert [answer.status_code for answer in wrong] == [400] * 5
        said = [answer.json()["error"]["message"].partition(":")[0] for answer in wrong]
        assert said == ["send a form"] * 2 + ["other is a file; files go into image or mask"] + [
            "prompt is missing",
            "image is missing",
        ]
        assert (client.get(url).status_code, client.get(f"{address}/v1/engines").status_code) == (404, 404)
        assert client.get(f"{address}/v1/engines").json()["error"]["type"] == "invalid_request_error"


def test_names_of_files_lead_nowhere(address, studio, tmp_path, photo):
    name = b'filename="../../up\\..\\dow\x00n.png"'
    form = b'--x\r\nContent-Disposition: form-data; name="image"; %s\r\n\r\n%s\r\n' % (name, photo.read_bytes())
    form += b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nSharpen it.\r\n'
    form += b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n1\r\n--x--\r\n'
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "multipart/form-data; boundary=x"}
    with httpx2.Client(headers=headers, timeout=PATIENCE) as client:
        answer = client.post(f"{address}/v1/images/edits", content=form)
    assert answer.status_code == 200, answer.text
    (tmp_path / "made.png").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert read_png(tmp_path / "made.png")["images"] == [{"name": "dow_n.png", "digest": file_digest(photo)}]


def test_the_documented_calls_work(address, tmp_path, photo, monkeypatch):
    """As they stand in docs/use_elsewhere.md, with this server's address and key."""
    section = (
        (ROOT / "docs/use_elsewhere.md").read_text(encoding="utf-8").partition("## HTTP API")[2].partition("\n## ")[0]
    )
    start, _ = re.findall(r"```bash\n(.*?)\n```", section, re.DOTALL)
    assert start.startswith("APP_API_KEY=sk-mine python eval/app.py ")
    context = options_of(import_module("eval.app").app, shlex.split(start)[3:])
    assert (context.params["api"], context.params["adapter"]) == (True, "mine/step-001000")
    here = section.replace("http://127.0.0.1:7999", address).replace("sk-mine", KEY)
    monkeypatch.chdir(tmp_path)
    mask_of(tmp_path / "mask.png", (0, 0, SIDE, SIDE // 2))
    (code,) = re.findall(r"```python\n(.*?)```", here, re.DOTALL)
    exec(compile(code, "use_elsewhere.md", "exec"), {})
    made = read_png(tmp_path / "edited.png")
    assert (made["seed"], made["steps"], made["prompt"]) == (7, 4, "Remove the sticker.")
    command = re.findall(r"```bash\n(.*?)\n```", here, re.DOTALL)[1]
    assert run(shlex.split(command), cwd=tmp_path).returncode == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert (answer["data"][0]["settings"]["mode"], answer["data"][0]["settings"]["feather"]) == ("inpaint", 4.0)


def options_of(function, words: list[str]) -> typer.Context:
    app = typer.Typer()
    app.command()(function)
    return typer.main.get_command(app).make_context("app", words)


def test_the_documented_options_are_the_knobs():
    text = (ROOT / "docs/use_elsewhere.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| every option of an edit"))
    listed = set(re.findall(r"`(\w+)`", row.partition("`extra_body`")[2]))
    have_rows = {"prompt", "size", "count"}
    assert listed == {each.name for each in KNOBS} - have_rows | {"model"}


def test_without_the_key_nothing_is_told_but_that_it_is_well(address, photo):
    with httpx2.Client() as visitor:
        assert visitor.get(f"{address}/health").json() == {"status": "ok", "waiting": 0}
        assert visitor.get(f"{address}/v1/models").status_code == 401
        other = {"Authorization": b"Bearer " + "ключ".encode()}
        assert visitor.get(f"{address}/v1/models", headers=other).status_code == 401
        basic = visitor.get(f"{address}/v1/models", headers={"Authorization": f"Basic {KEY}"})
        assert (basic.status_code, basic.headers["WWW-Authenticate"]) == (401, "Bearer")
    for wrong in ("wrong", KEY + "x", KEY[:-1]):
        stranger = openai.OpenAI(base_url=f"{address}/v1", api_key=wrong, max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError) as caught:
            stranger.images.edit(image=photo, prompt="x")
        assert caught.value.code == "invalid_api_key"


def test_who_guesses_keys_has_to_wait(studio):
    with serving(Api(studio, KEY, "tiny", Attempts(of_one=3))) as address:
        url = f"{address}/v1"

        def status(key: str) -> int:
            with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
                try:
                    return len(client.models.list().data)
                except openai.APIStatusError as error:
                    return error.status_code

        assert [status(key) for key in ("wrong", KEY, KEY, "wrong", KEY, "wrong")] == [401, 3, 3, 401, 3, 401]
        assert [status(key) for key in ("wrong", KEY)] == [429, 429]


def test_the_models_are_the_base_and_what_is_found(client):
    listed = client.models.list().data
    assert [each.id for each in listed] == ["tiny", *sorted((LBM, FLOW), reverse=True)]
    assert client.models.retrieve(LBM).owned_by == "adapter"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("lbm")


def test_an_edit_waits_for_those_of_the_page_and_a_full_line_is_429(client, studio, address, photo, monkeypatch):
    answers = []

    def edit():
        answers.append(client.images.edit(image=photo, prompt="Sharpen it.", extra_body={"steps": 1}))

    class Bar:
        def __call__(self, *_, **__):
            pass

    jobs = studio.jobs
    with jobs.running("somebody", "edit", Bar(), "Editing"):
        waiting = threading.Thread(target=edit)
        waiting.start()
        wait_until(lambda: jobs.waiting == 1)
        assert httpx2.get(f"{address}/health").json()["waiting"] == 1
        for place in ("eval.page.jobs", "eval.page.api.routes"):  # where it joins, and before a body is read
            with monkeypatch.context() as patched:
                patched.setattr(f"{place}.MAX_WAITING", 1)
                with pytest.raises(openai.RateLimitError, match="edits are waiting already") as caught:
                    client.images.edit(image=photo, prompt="Sharpen it.")
                assert int(caught.value.response.headers["Retry-After"]) > 0
        with pytest.raises(openai.UnprocessableEntityError):  # said without waiting
            client.images.edit(image=photo, prompt="Sharpen it.", extra_body={"steps": 0})
        impatient = client.with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            impatient.images.edit(image=photo, prompt="Sharpen it.")
        wait_until(lambda: jobs.waiting == 1)  # it has left
        assert answers == []
    waiting.join(PATIENCE)
    assert len(answers[0].data) == 1


def test_who_closes_the_connection_ends_the_edit(client, studio, photo, monkeypatch):
    ended, reached, left = [], threading.Event(), threading.Event()

    def edit(request, on_progress):
        reached.set()
        left.wait(PATIENCE)
        try:
            while True:
                on_progress(1, 2)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    monkeypatch.setattr(studio.editor, "edit", edit)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).images.edit(image=photo, prompt="Sharpen it.")
    assert reached.is_set()
    left.set()
    wait_until(lambda: ended)
    assert ended == ["Cancelled"]


def test_what_fails_is_a_sentence_without_a_place(client, studio, photo, monkeypatch, caplog):
    def failing(error):
        def edit(request, on_progress):
            raise error

        monkeypatch.setattr(studio.editor, "edit", edit)
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.edit(image=photo, prompt="Sharpen it.")
        return caught.value

    wrong = failing(InputError("/srv/models/mine/adapter.safetensors is not a safetensors file"))
    assert (wrong.status_code, wrong.body["message"]) == (422, "adapter.safetensors is not a safetensors file")
    broken = failing(KeyError("/srv/secret"))
    assert (broken.status_code, broken.type) == (500, "server_error")
    assert "secret" not in str(broken)
    assert "KeyError" in caplog.text
    full = failing(MemoryError())
    assert (full.status_code, full.code) == (500, "out_of_memory")


def test_places_are_taken_out_of_sentences():
    told = "no adapter at /srv/runs/mine or ~/x: looked at '/home/me/a b' (https://example.org/a/b, 1/2, runs/mine)"
    assert without_paths(told) == "no adapter at mine or ~/x: looked at 'a b' (https://example.org/a/b, 1/2, runs/mine)"

    roots = ["/srv/my runs", "/srv", "/home/me"]
    told = "/srv/my runs/mine/step-1/x.safetensors is in file:///srv/my runs/mine, file:///etc/a/b and '/srv/my runs'"
    assert without_paths(told, roots) == "mine/step-1/x.safetensors is in mine, b and ''"


def test_the_weight_of_an_adapter_is_refused_without_its_place(client, photo):
    with pytest.raises(openai.UnprocessableEntityError, match="the weight of flow/step-000002 must be a number"):
        client.images.edit(image=photo, prompt="x", extra_body={"adapter": f"{FLOW}:1e999"})


def test_an_upload_that_breaks_off_or_finds_no_room_is_a_refusal(tmp_path, monkeypatch):
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nabc'
    kind = [(b"content-type", b"multipart/form-data; boundary=x")]

    def refused(*messages) -> Refusal:
        coming = iter(messages)

        async def receive():
            return next(coming)

        request = Request({"type": "http", "app": None, "method": "POST", "headers": kind}, receive)
        with pytest.raises(Refusal) as caught:
            asyncio.run(read_body(request, Limits(), tmp_path))
        return caught.value

    begun = {"type": "http.request", "body": part, "more_body": True}
    assert refused(begun, {"type": "http.disconnect"}).status == 400

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refusal = refused(begun, {"type": "http.request", "body": b"\r\n--x--\r\n"})
    assert (refusal.status, "No space left on device" in refusal.message) == (500, True)


def test_models_are_called_as_people_call_them(tmp_path):
    cached = tmp_path / "hub/models--Qwen--Qwen-Image-Edit-2511/snapshots/0123abc"
    names = {str(cached): "Qwen/Qwen-Image-Edit-2511", "Qwen/Qwen-Image-Edit-2511": "Qwen/Qwen-Image-Edit-2511"}
    names |= {str(tmp_path / "tiny"): "tiny", "/models/tiny/": "tiny"}
    assert {place: model_name(place) for place in names} == names


def test_a_key_can_be_sent_and_is_drawn_anew():
    assert api_key_for("sk-1") == "sk-1"
    assert api_key_for(None) != api_key_for("")
    assert len(api_key_for(None)) >= 32
    for wrong in ("two words", "schlüssel", "line\n"):
        with pytest.raises(InputError, match="--api-key must be"):
            api_key_for(wrong)


def test_wrong_attempts_are_counted_by_address_and_in_all():
    now = [0.0]
    attempts = Attempts(window=60, of_one=2, of_all=3, clock=lambda: now[0])
    assert [attempts.begin("a"), attempts.begin("a")] == [0, 0]
    now[0] = 10
    assert attempts.begin("a") == 50
    attempts.was_right("a")
    assert [attempts.begin("a"), attempts.begin("a")] == [0, 50]
    assert [attempts.begin("b"), attempts.begin("c")] == [0, 50]  # three in all
    now[0] = 60
    assert [attempts.begin("c"), attempts.begin("c")] == [0, 10]


def test_the_wrong_attempts_of_others_lock_nobody_out_who_was_right():
    now = [0.0]
    attempts = Attempts(window=60, of_one=2, of_all=3, clock=lambda: now[0])
    attempts.begin("known")
    attempts.was_right("known")
    assert [attempts.begin(other) for other in "abcd"] == [0, 0, 0, 60]
    assert [attempts.begin("known"), attempts.begin("known")] == [0, 0]
    assert attempts.begin("known") == 60  # its own are counted
    now[0] = KNOWN
    assert [attempts.begin(other) for other in ("a", "b", "c", "known")] == [0, 0, 0, 60]
