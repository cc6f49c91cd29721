"""What the API serves: edits, the models that there are, and whether it is well.

It is a Starlette application beside the page's, with a key of its own. Its edits stand in the page's line.
"""

import base64
import hmac
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from data_prep.errors import InputError, is_out_of_memory
from eval.page.api.body import Body, read_body
from eval.page.api.refusals import Refusal, without_paths
from eval.page.api.wanted import make_request
from eval.page.attempts import Attempts, address_of
from eval.page.jobs import MAX_WAITING, Cancelled, LineIsFull
from eval.page.studio import Studio
from eval.request.provenance import png_bytes
from eval.request.request import EditRequest, EditResult
from train.record.lookup import FoundAdapter

TAB = "api"
AGAIN = 30
"""Seconds after which one may come again to whom the line was full."""
READERS = 2
"""Requests whose pictures are decoded at the same time."""
SPARE = 8
"""Threads beside those of all that may wait, for who is told that too many do."""

SILENT: Any = lambda *_, **__: None  # noqa: E731
"""In place of the page's bar."""

logger = logging.getLogger("page")


@dataclass
class Api:
    """The page's studio, and what is the API's own."""

    studio: Studio
    key: str
    base: str
    """The base model's name."""
    attempts: Attempts = field(default_factory=Attempts)
    reading: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(READERS))
    threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(MAX_WAITING + SPARE))
    places: Sequence[Path] = ()
    """Further folders that answers do not name: the model's."""

    def models(self) -> dict[str, FoundAdapter | None]:
        """Name -> adapter of all that may be asked for; the base model's is None."""
        return {self.base: None, **{each.name: each for each in self.studio.adapters()}}

    @property
    def roots(self) -> list[str]:
        """Folders of this machine, which answers do not name."""
        folders = [self.studio.runs, self.studio.out, *self.places, Path.home(), Path(tempfile.gettempdir())]
        return [str(each) for folder in folders for each in {folder.absolute(), folder.resolve()} if each != Path("/")]

    @property
    def standard(self) -> str:
        """Where a request names no model."""
        return self.studio.first_adapter or self.base


def api_routes(api: Api) -> list[BaseRoute]:
    """For the application that the page is in: `/v1/…` and `/health`."""

    def answered(endpoint: Callable[[Api, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                check_key(api, request)
                return await endpoint(api, request)
            except Refusal as refusal:
                return refusal.response(api.roots)

        return answer

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": api.studio.jobs.waiting})

    async def unknown(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        told = f"there is no {request.method} {request.url.path} here"
        return Refusal(404, told, code="not_found" if status == 404 else "wrong_method").response()

    inner = Starlette(
        routes=[
            Route("/images/edits", answered(edits), methods=["POST"]),
            Route("/models", answered(models), methods=["GET"]),
            Route("/models/{name:path}", answered(model), methods=["GET"]),
        ],
        exception_handlers={404: unknown, 405: unknown},
    )
    return [Mount("/v1", app=inner), Route("/health", health, methods=["GET"])]


def check_key(api: Api, request: Request) -> None:
    """Whether a request carries the key, as `Authorization: Bearer KEY`.

    Raises:
        Refusal: 401, or 429 to who has sent too many wrong ones.
    """
    address = address_of(request.scope)
    if wait := api.attempts.begin(address):
        raise Refusal(429, f"too many requests with a wrong key: wait {max(1, round(wait))} seconds", wait=wait)
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    # Bytes, since strings of other letters than ASCII cannot be compared in constant time.
    if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api.key.encode()):
        raise Refusal(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")
    api.attempts.was_right(address)


async def models(api: Api, request: Request) -> Response:
    """The base model and the adapters that are there now, the newest first."""
    return JSONResponse({"object": "list", "data": [_described(*each) for each in api.models().items()]})


async def model(api: Api, request: Request) -> Response:
    """One of them."""
    name, known = request.path_params["name"], api.models()
    if name not in known:
        raise Refusal(404, f"there is no model {name!r}: /v1/models lists those that are there", code="model_not_found")
    return JSONResponse(_described(name, known[name]))


def _described(name: str, adapter: FoundAdapter | None) -> dict[str, Any]:
    created = int(adapter.path.stat().st_mtime) if adapter else 0
    return {"id": name, "object": "model", "created": created, "owned_by": "adapter" if adapter else "base"}


async def edits(api: Api, request: Request) -> Response:
    """Edits, one after the other with all of the page's. Who closes the connection leaves the line, or ends the edit."""
    if api.studio.jobs.waiting >= MAX_WAITING:
        raise Refusal(429, f"{MAX_WAITING} edits are waiting already: try again later", wait=AGAIN)
    with tempfile.TemporaryDirectory(prefix="edit-") as folder:
        body = await read_body(request, api.studio.limits, Path(folder))
        return await _unless_left(api, request, body)


async def _unless_left(api: Api, request: Request, body: Body) -> Response:
    session, gone = uuid.uuid4().hex, threading.Event()
    answers: list[Response] = []

    async def work() -> None:
        answers.append(await anyio.to_thread.run_sync(_answer, api, body, session, gone, limiter=api.threads))
        tasks.cancel_scope.cancel()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()
        api.studio.jobs.leave(session)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        tasks.start_soon(watch)
    return answers[0]


def _answer(api: Api, body: Body, session: str, gone: threading.Event) -> Response:
    """In a thread of its own, in which it waits for the device too."""
    studio = api.studio
    try:
        with errors_as_refusals():
            _read(api, body)  # what is wrong is said at once, and no picture is kept while it waits
            with studio.jobs.running(session, TAB, SILENT, "Editing", counted=False) as on_progress:
                if gone.is_set():
                    raise Cancelled
                request, sources = _read(api, body)
                notes = list(studio.editor.notes(request))
                results = studio.edit(request, on_progress)
            return JSONResponse(_made(results, sources, [without_paths(note, api.roots) for note in notes]))
    except Refusal as refusal:
        return refusal.response(api.roots)


def _read(api: Api, body: Body) -> tuple[EditRequest, list[tuple[str, str]]]:
    with api.reading:
        request, sources = make_request(body, api.models(), api.standard, api.studio.limits)
    api.studio.editor.check(request)
    return request, sources


@contextmanager
def errors_as_refusals() -> Iterator[None]:
    """What goes wrong is a refusal; what is not the client's to mend is also in the log, with its traceback."""
    try:
        yield
    except Refusal:
        raise
    except LineIsFull as error:
        raise Refusal(429, str(error), wait=AGAIN) from None
    except InputError as error:
        raise Refusal(422, str(error)) from None
    except Cancelled:
        raise Refusal(503, "the edit was stopped: the connection was closed, or the server ends") from None
    except Exception as error:
        logger.exception("an edit of the API failed")
        if is_out_of_memory(error):
            told = "there is not enough memory on the device: a smaller size, fewer images or n=1 need less"
            raise Refusal(500, told, code="out_of_memory") from None
        raise Refusal(500, f"the edit failed: {type(error).__name__}. The server's log says more") from None


def _made(results: list[EditResult], sources: list[tuple[str, str]], notes: list[str]) -> dict[str, Any]:
    """OpenAI's answer, and beside each picture what its file says of how it was made."""
    data = [
        {
            "b64_json": base64.b64encode(png_bytes(each, sources)).decode(),
            "seed": each.seed,
            "settings": each.settings,
        }
        for each in results
    ]
    shown = results[0].image
    answer = {"created": int(time.time()), "data": data, "background": "opaque", "output_format": "png"}
    return answer | {"size": f"{shown.width}x{shown.height}", "notes": notes}
