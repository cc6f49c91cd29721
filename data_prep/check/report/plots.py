"""Histograms as inline SVG that suits a light page and a dark one."""

import io
import re

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TITLES = {
    "side": ("Size", "square root of the target's area, pixels", False),
    "aspect": ("Aspect", "width over height, logarithmic", True),
    "tokens": ("Prompt length", "tokens", False),
    "shift": ("Shift", "pixels between source and target, as trained", False),
    "zoom": ("Zoom", "per cent between source and target", False),
}
"""Spread -> title, label, and whether the axis is logarithmic."""
NUM_BARS = 40


def histogram(name: str, values: np.ndarray) -> Markup:
    """A chart of one of the spreads, for the page's style sheet: text and lines have the page's own colour.

    Args:
        name: a key of `TITLES`.
        values: finite, at least one.
    """
    _, label, logarithmic = TITLES[name]
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-3 * max(1.0, abs(high)):  # one value: a bar, not a wall
        low, high = (low / 1.5, high * 1.5) if logarithmic else (low - 1 - abs(low) / 2, high + 1 + abs(high) / 2)
    edges = np.geomspace(low, high, NUM_BARS + 1) if logarithmic else np.linspace(low, high, NUM_BARS + 1)
    figure = Figure(figsize=(5.6, 2.5), layout="constrained")
    axes = figure.add_subplot()
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#2563eb")
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _svg(figure: Figure) -> Markup:
    """Without the XML head; black becomes the colour of the text around it."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "check", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return Markup(re.sub(r"#000000\b|\bblack\b", "currentColor", text))
