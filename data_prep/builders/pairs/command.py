"""Folders of sources and targets -> dataset: files of one name, in folders beside each other, are one row."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.builders.common.dataset import build_dataset
from data_prep.builders.common.picture_check import check_pictures
from data_prep.builders.common.prompts import PromptOption, Templates, TemplatesOption, make_templates, read_templates
from data_prep.builders.pairs.captions import Caption, read_caption
from data_prep.builders.pairs.pair_folders import PairFolders, find_pairs, pair_items
from data_prep.cli import CORES, Engine, OnError, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import Item
from data_prep.rows.tables import BadRow

FIELDS = ("stem", "folder", "tag")
"""What a prompt template may use: the files' name without its ending, the folder that they are in below `target/`, and
the tag of the caption file."""


def command(
    folder: Annotated[Path, typer.Option(help="Folder that contains a folder of sources and a folder of targets.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write dataset.jsonl to.", show_default="FOLDER itself")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Name of the folder with the sources. Repeatable.", show_default="source, before, …"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Name of the folder with the targets.", show_default="target, after, …")
    ] = None,
    prompt: PromptOption = None,
    templates: TemplatesOption = None,
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Makes a dataset from folders of images. Files with the same name in before/, after/, mask/ and ref_gt/ are one row.

    Sources are in source, before, input or original; targets are in target, after, output, edited or result. --source and
    --target name other folders. Folders may be nested. Up to three folders hold the sources (source_1, source_2, …), in the
    order of their names, and every row needs a file in each. Masks (white = background to preserve) and ground truths are
    optional. Images stay where they are. Each is decoded once, so that every row of the dataset can be used.

    The instruction is the first of these that exists:
    (1) --prompt or --templates, with the fields {stem} (file name without its ending), {folder} (below the targets) and {tag};
    (2) caption/NAME.txt or caption/NAME.json;
    (3) a file NAME.txt or NAME.json beside the target, or else beside a source;
    (4) FOLDER/caption.txt, for all rows: one template per line, as in (1).
    A .json file has the key "prompt" or "caption". It may also have "negative_prompt", "tag" and "group", which are used
    with (1) too.

    python data_prep/run.py pairs --folder photos --prompt "Remove the {stem}"
    """
    folder = Path(os.path.abspath(folder))
    given = make_templates(prompt, templates, seed)
    pairs = find_pairs(folder, source or (), target)
    make = MakePair(_templates_of_all(pairs, folder, given, seed))
    for remark in pairs.remarks():
        print(remark)
    workers = make_engine(engine, processes, preload=["numpy", "PIL.Image"])
    build_dataset(
        pair_items(pairs), make, out or folder, workers, title="pairs", total=len(pairs.stems), on_error=on_error
    )


@dataclass(frozen=True)
class MakePair:
    """Decodes the pictures of a pair and finds its instruction."""

    templates: Templates | None
    """None: each pair has a caption file, which says the instruction."""

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        paths = item.values
        row = {
            "image": Path(paths["target"]),
            "edit_image": [Path(path) for path in paths["sources"]],
            "back_mask": Path(paths["mask"]) if paths["mask"] else None,
            "ref_gt": Path(paths["ref_gt"]) if paths["ref_gt"] else None,
        }
        caption = self._caption(paths["caption"])
        prompt = self._prompt(item, caption)
        check_pictures(row)
        more = {"negative_prompt": caption.negative_prompt, "tag": caption.tag, "group": caption.group}
        return [{"id": item.id, "prompt": prompt, **row, **more}]

    def _caption(self, path: str | None) -> Caption:
        """Templates take the place of a text file, but not of what else a JSON file says."""
        if path is None or (self.templates and not path.lower().endswith(".json")):
            return Caption()
        return read_caption(Path(path))

    def _prompt(self, item: Item, caption: Caption) -> str:
        if self.templates is not None:
            folder, _, stem = item.id.rpartition("/")
            return self.templates.fill(item.id, {"stem": stem, "folder": folder, "tag": caption.tag})
        if item.values["caption"] is None:
            raise BadRow("there is no caption file of this name, as others have")
        if not caption.prompt:
            raise BadRow(f"its caption file {item.values['caption']} has no instruction")
        return caption.prompt


def _templates_of_all(pairs: PairFolders, folder: Path, given: Templates | None, seed: int) -> Templates | None:
    """The templates that all rows share, or None if rows have caption files."""
    if given is None and not pairs.have_captions():
        if not (common := folder / "caption.txt").is_file():
            raise InputError(
                f"there are no instructions in {folder}: give --prompt or --templates, write NAME.txt or NAME.json beside "
                "the targets or in caption/, or caption.txt for all rows"
            )
        given = read_templates(common, seed)
    if given is not None:
        given.check_fields(FIELDS)
    return given
