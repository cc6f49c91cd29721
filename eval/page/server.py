"""Starts the page on an address, and ends it on Ctrl-C."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from data_prep.errors import InputError
from data_prep.rows.rows import Row, read_rows
from eval.page.api.routes import Api, api_routes
from eval.page.attempts import Attempts, ThrottledLogin
from eval.page.jobs import MAX_WAITING
from eval.page.layout import HEAD, STYLE, build_page, theme
from eval.page.limits import Limits, is_loopback
from eval.page.studio import Example, Studio
from eval.page.tabs.results import FOLDER
from eval.request.base import BaseEditor

THREADS = 40
"""For everything but edits, which have one each."""


@dataclass(frozen=True)
class Address:
    """Where the page is, and for whom."""

    host: str
    port: int
    share: bool = False
    """Through Gradio's tunnel, at a public address."""
    login: tuple[str, str] | None = None
    """User and password; None on this machine alone."""


def make_studio(
    editor: BaseEditor, title: str, out: Path, runs: Path, limits: Limits, first_adapter: str | None = None
) -> Studio:
    """What the page works with. Models load with the first edit.

    Args:
        first_adapter: name of the adapter that is chosen when the page opens.

    Raises:
        InputError: there is no such adapter.
    """
    studio = Studio(editor, title, out, runs, limits, first_adapter=first_adapter)
    names = [adapter.name for adapter in studio.adapters()]
    if first_adapter and first_adapter not in names:
        known = f"there are {', '.join(names[:5])}" if names else "there is none"
        raise InputError(f"no adapter named {first_adapter} below {runs}: {known}")
    return studio


def read_examples(dataset: str, root: str | None) -> list[Example]:
    """Sources and prompts of a dataset's usable rows: of those that are held out, if there are any.

    Raises:
        InputError: no such dataset, or no row of it can be used.
    """
    rows = [row for row in read_rows(dataset, root) if isinstance(row, Row)]
    if not rows:
        raise InputError(f"{dataset} has no row that can be used")
    held_out = [row for row in rows if row.split != "train"]
    return [Example(row.edit_image[row.bridge_image], row.prompt) for row in held_out or rows]


def serve(studio: Studio, address: Address, api: Api | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM. Edits that run then end at their next step.

    Args:
        api: served beside the page, if given.

    Raises:
        InputError: the port was taken in the meantime.
    """
    _set_environment(studio.cache)
    studio.limits.apply()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports each of Gradio's checks of its own address
    page = build_page(studio)
    page.queue(api_open=False)
    with _until_stopped() as stopped:
        try:
            _, url, public = page.launch(
                server_name=address.host,
                server_port=address.port,
                share=address.share,
                max_threads=THREADS + MAX_WAITING,
                auth=address.login,
                max_file_size=studio.limits.max_upload_bytes,
                allowed_paths=[str(studio.out / FOLDER)],
                blocked_paths=[str(studio.votes_file)],
                app_kwargs={
                    "middleware": [Middleware(ThrottledLogin, attempts=Attempts()), Middleware(OwnFilesOnly)],
                    "routes": api_routes(api) if api else [],
                    "docs_url": None,
                    "redoc_url": None,
                },
                theme=theme(),
                css_paths=STYLE,
                head=HEAD,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                pwa=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise InputError(f"cannot serve on {address.host} port {address.port} ({error})") from None
        print(f"Open {public or url} in a browser. Pictures and votes go to {studio.out}. Ctrl-C ends.", flush=True)
        if not is_loopback(address.host):
            print("Other machines can reach this page; it asks for the password.", flush=True)
        if api:
            print(f"The API is at {(public or url).rstrip('/')}/v1 and asks for its key.", flush=True)
        stopped.wait()
    studio.jobs.cancel_all()
    page.close(verbose=False)
    print("stopped", flush=True)


def _set_environment(cache: Path) -> None:
    """Gradio reads these when a page is built: uploads and pictures on display lie in the output folder, no telemetry."""
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(cache / "examples")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in (
        "GRADIO_ALLOWED_PATHS",
        "GRADIO_SHARE",
        "GRADIO_SERVER_NAME",
        "GRADIO_ROOT_PATH",
        "GRADIO_NUM_WORKERS",
    ):
        os.environ.pop(name, None)  # would open what the command line did not ask for


@contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    stopped = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class OwnFilesOnly:
    """Refuses to fetch other sites' files for a visitor, which Gradio's `file=` route would do."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 403, or hands on."""
        path = scope.get("path", "")
        if (
            scope["type"] == "http"
            and "file=" in path
            and path.split("file=", 1)[1].lstrip("/").lower().startswith("http")
        ):
            await PlainTextResponse("Only files of this page are served.", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
