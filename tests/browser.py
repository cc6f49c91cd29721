"""The web page in Chromium, for the tests that drive it as a person would. Pictures of it go to artifacts/."""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from data_prep.model.geometry import Geometry
from tests.adapters import write_adapter
from tests.children import started, wait_until
from tests.commands import ROOT

ARTIFACTS = Path(os.environ.get("ARTIFACTS_DIR", ROOT / "artifacts"))
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SIDE = 64
SMALL = Geometry(max_pixels=SIDE * SIDE, vision_pixels=56 * 56)
PATIENCE = 90_000
"""Milliseconds, on a busy machine."""
RESTORED = """
(() => {
  const parse = JSON.parse;
  JSON.parse = (text, ...others) => {
    if (String(text).startsWith('{"opened_with"')) window.restored = text;
    return parse(text, ...others);
  };
})();
"""
"""Records what the page reads of the browser's storage, which is encrypted."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. CI must have it."""
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs chromium: apt-get install chromium")
        pytest.skip("no chromium on this machine: apt-get install chromium")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(log: Path, *arguments: str | Path, port: int | None = None) -> Iterator[tuple[Popen, int]]:
    """The command, until it is interrupted; yields the process and its port. `log` gets all that it prints."""
    port = port or free_port()
    command = [sys.executable, "eval/app.py", *map(str, arguments), "--port", str(port)]
    with log.open("w") as file, started(command, stdout=file, stderr=file) as process:
        wait_until(lambda: f"Open http://127.0.0.1:{port}" in log.read_text(), process)
        yield process, port


def write_runs(runs: Path, model: Path) -> Path:
    """Two runs with a checkpoint each: a bridge and one of flow matching."""
    write_adapter(runs / "lbm/checkpoints/step-000002", model, "lbm", SMALL, bridge_noise=0.0)
    write_adapter(runs / "flow/checkpoints/step-000002", model, "flow", SMALL)
    return runs


def choose(page: Page, field: str, option: str) -> None:
    """Picks an option of a dropdown."""
    page.click(f"{field} input")
    page.get_by_role("option", name=option).click()


def upload(page: Page, path: Path, box: str = "#source") -> None:
    """Replaces what is there. Again if an answer that was on its way, as that of a button, takes it away."""
    for _ in range(5):
        page.set_input_files(f"{box} input[type=file]", path)
        with suppress(AssertionError):
            expect(page.locator(f"{box} img")).to_have_attribute("src", re.compile(path.stem), timeout=PATIENCE / 5)
            return
    raise AssertionError(f"{path} does not appear in {box}")


def toast(page: Page, text: str) -> None:
    """A message appears, and is closed."""
    message = page.locator(".toast-body", has_text=text)
    expect(message.first).to_be_visible()
    page.evaluate("document.querySelectorAll('.toast-close').forEach((button) => button.click())")
    expect(message).to_have_count(0)


def results(out: Path) -> list[Path]:
    """What the page has made, the oldest first."""
    return sorted((out / "results").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def edit(page: Page, out: Path, count: int = 1, button: str = "#run") -> list[Path]:
    """Clicks, and waits for the files and for the page."""
    before, shown = len(results(out)), page.locator("#download a, a#download")
    old = shown.first.get_attribute("href") if shown.count() else None
    page.click(button)
    deadline = time.monotonic() + PATIENCE / 1000
    while len(results(out)) < before + count and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    made = results(out)[before:]
    assert len(made) == count
    if old:
        expect(shown.first).not_to_have_attribute("href", old)
    expect(page.locator("#result img").first).to_be_visible()
    expect(page.locator("#status")).to_be_hidden()
    return made


def shot(page: Page, name: str) -> None:
    """A picture of what is to be seen."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")
