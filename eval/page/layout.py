"""The whole page: heading, tabs, looks."""

from pathlib import Path

import gradio as gr
from gradio.themes import Base
from gradio.themes.utils import colors, sizes
from markupsafe import escape

from eval.page.studio import Studio, session_of
from eval.page.tabs.compare_tab import build_compare_tab
from eval.page.tabs.edit_tab import build_edit_tab
from eval.page.tabs.runs_tab import build_runs_tab

STYLE = Path(__file__).with_name("style.css")
SECONDS_KEPT = 24 * 3600
"""Uploads and pictures on display are deleted after a day; results and votes stay."""
FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "sans-serif"]
"""Of the reader's own machine: nothing is fetched."""
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]

HEAD = f"<script>{Path(__file__).with_name('page.js').read_text()}</script>"
"""What Gradio's components do not do."""


def build_page(studio: Studio) -> gr.Blocks:
    """Puts the tabs together; nothing is loaded or served yet."""
    with gr.Blocks(
        title="Edit pictures by instruction",
        analytics_enabled=False,
        delete_cache=(3600, SECONDS_KEPT),
        fill_width=True,
    ) as page:
        gr.HTML(
            "<header><h1>Edit pictures by instruction</h1>"
            f"<p>{escape(studio.title)} · results say in their file that a generative model made them</p></header>"
        )
        with gr.Tabs():
            with gr.Tab("Edit", id="edit"):
                build_edit_tab(studio, page)
            with gr.Tab("Compare", id="compare"):
                build_compare_tab(studio, page)
            with gr.Tab("Runs", id="runs"):
                build_runs_tab(studio, page)

        def left(request: gr.Request) -> None:
            studio.jobs.leave(session_of(request))

        page.unload(left)
    return page


def theme() -> Base:
    """Gradio's base theme with the reader's own fonts, and one accent colour."""
    return Base(
        primary_hue=colors.indigo,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        font=FONTS,
        font_mono=MONO_FONTS,
    ).set(
        # Text on its ground has a contrast of 4.5 and more in both schemes.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="white",
        block_label_background_fill_dark="*neutral_900",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_width="1px",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        button_large_text_size="*text_md",
        button_large_text_weight="500",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
    )
