"""What a part of the acceptance has found, and how it is shown."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from data_prep.files import write_text

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 360
"""Width of an image on the page, in pixels."""


@dataclass(frozen=True)
class Options:
    """What was asked for. The results of a part depend on all of it."""

    model: str
    """Folder of the base model."""
    name: str
    """As it was given: a folder or a hub id."""
    out: Path
    device: str
    dtype: str
    """Data type of the weights where rounded numbers are compared, trained and edited with."""
    side: int
    """Side of the images, in pixels."""
    rank: int
    train_steps: int
    base_steps: int
    lightning: Path | None
    """A step-distilled LoRA to edit with."""
    tiny: bool
    """The race against DiffSynth has the tiny model's sizes."""

    @property
    def vision_pixels(self) -> int:
        """At which the text encoder sees pictures: 384 x 384, less where the pictures are small."""
        return 384 * 384 if self.side >= 384 else 112 * 112


@dataclass(frozen=True)
class Check:
    """A line of the table."""

    name: str
    value: float | int | str
    bound: str = ""
    """What it must be, or what was planned."""
    passed: bool | None = None
    """None for a figure that nothing depends on."""


@dataclass
class Findings:
    """The findings of one part, which grow while it runs."""

    part: str
    key: str = ""
    """Key of what it depends on: a part with another key is done again."""
    checks: list[Check] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """File and caption."""
    seconds: float = 0.0
    error: str = ""
    """What ended it early."""
    device: str = ""
    """The card that it ran on."""

    @property
    def passed(self) -> bool:
        """It came to its end, and every check holds."""
        return not self.error and any(check.passed for check in self.checks) and self.failed == 0

    @property
    def failed(self) -> int:
        """Checks that do not hold."""
        return sum(check.passed is False for check in self.checks)

    def holds(self, name: str, passed: bool, value: Any = "", bound: str = "") -> None:
        """A check by any rule."""
        self.checks.append(Check(name, value, bound, bool(passed)))

    def at_most(self, name: str, value: float, bound: float) -> None:
        """A check of an error; one that is no number does not pass."""
        self.checks.append(Check(name, value, f"≤ {bound:.3g}", math.isfinite(value) and value <= bound))

    def figure(self, name: str, value: Any, planned: Any = "") -> None:
        """Something to know."""
        self.checks.append(Check(name, value, f"plan {show(planned)}" if planned not in ("", None) else ""))

    def save(self, out: Path) -> None:
        """Where `read` finds it."""
        (out / "parts").mkdir(parents=True, exist_ok=True)
        write_text(out / "parts" / f"{self.part}.json", json.dumps(asdict(self), indent=1) + "\n")


def read(out: Path, part: str) -> Findings | None:
    """What the part has found before, if it has been run."""
    file = out / "parts" / f"{part}.json"
    if not file.exists():
        return None
    stored = json.loads(file.read_text())
    return Findings(**stored | {"checks": [Check(**check) for check in stored["checks"]]})


def show(value: Any) -> str:
    """A number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(passed: bool | None) -> str:
    """In a word."""
    return {True: "passed", False: "FAILED", None: ""}[passed]


def table(results: Sequence[Findings]) -> str:
    """A line for each check, below its part."""
    lines = []
    for result in results:
        lines.append(f"{result.part:<64}{verdict(result.passed):>8}   {result.seconds:.0f} s")
        lines += [
            f"    {check.name:<60}{verdict(check.passed):>8}   {show(check.value)}{f'  ({check.bound})' * bool(check.bound)}"
            for check in result.checks
        ]
        if result.error:
            lines += [f"    {line}" for line in result.error.splitlines()]
    good = sum(result.passed for result in results)
    return "\n".join([*lines, f"{good} of {len(results)} parts passed"])


def write_page(out: Path, title: str, facts: Sequence[tuple[str, Any]], results: Sequence[Findings]) -> Path:
    """OUT/accept.html, with all pictures inside."""
    templates = [Path(__file__).parent, ROOT / "eval/report/templates"]
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"show": show, "verdict": verdict, "picture": lambda file: _picture(Path(file), out)}
    write_text(
        out / "accept.html",
        environment.get_template("accept.html.j2").render(title=title, facts=facts, results=results),
    )
    return out / "accept.html"


def _picture(file: Path, out: Path) -> str:
    """A data URI of the picture, reduced."""
    small = out / "page" / f"{file.stem}.jpg"
    small.parent.mkdir(exist_ok=True)
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((WIDTH, WIDTH))
    picture.save(small, quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(small.read_bytes()).decode()
