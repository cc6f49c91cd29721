"""COCO annotations and photographs -> rows: edited pictures with masks of what was annotated, or objects cut out."""

import difflib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image, ImageFilter, ImageOps

from data_prep.builders.coco.annotations import CocoFile, read_coco
from data_prep.builders.coco.segmentations import RLE, annotated_size, share, to_rle, turn_like, union
from data_prep.builders.coco.selection import Choice, PerName, Targets
from data_prep.builders.common.dataset import build_dataset
from data_prep.builders.common.prompts import PromptOption, Templates, TemplatesOption, make_templates
from data_prep.builders.common.results import exact_mask, save_result
from data_prep.cli import CORES, Engine, OnError, Out, Processes, Seed
from data_prep.errors import InputError
from data_prep.jobs.engines import make_engine
from data_prep.jobs.items import Item
from data_prep.rows.images import RejectedImage, image_size_text, open_image
from data_prep.rows.tables import BadRow

PROMPT_FIELDS = ("category", "supercategory", "caption", "image_id", "file_name")
"""What prompt templates may speak of. Of several objects, `category` is as in "dog, cat and bird"."""
SHAPE_TOLERANCE = 0.02
"""By which the aspects of a photograph and its edited picture may differ."""
PRELOAD = ("numpy", "PIL.Image", "pycocotools.mask")


def command(
    annotations: Annotated[Path, typer.Option(help="COCO annotation file with instances, captions or both.")],
    images: Annotated[Path, typer.Option(help="Folder with the photographs.")],
    out: Out,
    targets: Annotated[
        Path | None, typer.Option(help="Folder with the edited images, named like the photographs or by image id.")
    ] = None,
    make: Annotated[
        Literal["cutout"] | None,
        typer.Option(help="Make the targets instead: the photograph's objects alone, on white."),
    ] = None,
    per: Annotated[
        PerName,
        typer.Option(
            help="Make one row per image, or one per annotation. With one per annotation, edited images are named "
            "NAME_ANNOTATIONID.png."
        ),
    ] = "image",
    prompt: PromptOption = None,
    templates: TemplatesOption = None,
    captions: Annotated[
        Path | None, typer.Option(help="COCO caption file for the same images, used for {caption}.")
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help="Use only objects of these categories, such as person,traffic light.")
    ] = None,
    min_area: Annotated[
        float, typer.Option(help="Use only objects that cover at least this share of the image, 0–1.")
    ] = 0.0,
    seed: Seed = 0,
    processes: Processes = CORES,
    engine: Engine = "local",
    on_error: OnError = "raise",
) -> None:
    """Makes a dataset from a COCO annotation file and its photographs.

    With --targets, each photograph and its edited image are a pair. The mask comes from the annotations: white is background,
    black is the objects. With --make cutout, the target is the photograph's objects on white. Prompts may use the fields
    {category}, {supercategory}, {caption}, {image_id} and {file_name}.

    data_prep/run.py coco --annotations instances.json --images train2017 --targets edited --out data/coco
    --prompt 'Remove the {category}.' --categories dog,cat
    """
    if (targets is None) == (make is None):
        raise InputError(
            "a COCO file has no edited pictures: give either --targets FOLDER with them, or --make cutout for rows of the "
            "objects on white"
        )
    if not 0 <= min_area < 1:
        raise InputError(f"--min-area must be from 0 to below 1, got {min_area:g}")
    if not images.is_dir():
        raise InputError(f"--images {images} is not a folder")
    texts = make_templates(prompt, templates, seed)
    if texts is None:
        raise InputError("rows need an instruction: give --prompt 'Remove the {category}.' or --templates FILE")
    texts.check_fields(PROMPT_FIELDS)
    file = read_coco(annotations, captions)
    wanted = _categories(categories, file)
    all_objects = wanted is None and min_area == 0 and per == "image" and make is None
    needed = not all_objects or bool(texts.fields() & {"category", "supercategory"})
    choice = Choice(file, Path(os.path.abspath(images)), per, wanted, needed, crowds=make is None)
    items = choice.items(Targets.of(targets) if targets else None)
    workers = make_engine(engine, processes, PRELOAD)
    build_dataset(
        items,
        MakeCoco(texts, min_area, seed),
        out,
        workers,
        title="annotations",
        on_error=on_error,
        writes=("masks", "pictures"),
    )


@dataclass(frozen=True)
class MakeCoco:
    """An image and some of its annotations -> a row, or none if all objects are too small."""

    templates: Templates
    min_area: float
    seed: int

    def __call__(self, item: Item, out: Path) -> list[dict[str, Any]]:
        values, path = item.values, item.files[0]
        photo = open_image(path)
        covers = self._covers(values["objects"], annotated_size(_pair(values["size"]), photo, path))
        if values["objects"] and not covers:
            return []
        kept = [values["objects"][place] for place in covers]
        mask = turn_like(union(covers.values()), photo, path) if covers else None
        category = _and_list(kept, "category")
        row = {
            "id": item.id,
            "prompt": self._prompt(item, category, _and_list(kept, "supercategory")),
            "edit_image": path,
            "group": values["file_name"],
        }
        if len(item.files) > 1:
            _check_shape(item.files[1], photo)
            back_mask = save_result(ImageOps.invert(mask), out / "masks", item.id) if mask else None
            return [row | {"image": item.files[1], "back_mask": back_mask, "tag": category}]
        assert mask is not None  # cut-outs are made of images with objects only
        target = _on_white(photo, mask)
        back_mask = save_result(exact_mask(photo, target), out / "masks", item.id)
        return [
            row | {"image": save_result(target, out / "pictures", item.id), "back_mask": back_mask, "tag": "cutout"}
        ]

    def _covers(self, objects: list[dict[str, Any]], size: tuple[int, int]) -> dict[int, RLE]:
        """Place among the objects -> what it covers, of those that are large enough. One that is broken rejects the row."""
        covers = {}
        for place, each in enumerate(objects):
            try:
                rle = to_rle(each["segmentation"], size)
            except BadRow as error:
                raise BadRow(f"its annotation {each['id']} ({each['category']}) {error}") from None
            if share(rle) >= self.min_area:
                covers[place] = rle
        return covers

    def _prompt(self, item: Item, category: str, supercategory: str) -> str:
        captions = item.values["captions"]
        caption = random.Random(f"{self.seed}/{item.id}/caption").choice(captions).strip() if captions else ""
        known = {"category": category, "supercategory": supercategory, "caption": caption}
        known |= {"image_id": item.values["image_id"], "file_name": item.values["file_name"]}
        return self.templates.fill(item.id, known)


def _pair(size: Any) -> tuple[int, int] | None:
    return (size[0], size[1]) if size else None


def _and_list(objects: list[dict[str, Any]], name: str) -> str:
    """`dog`, `dog and cat`, `dog, cat and bird`: each once, in the file's order."""
    *others, last = dict.fromkeys(each[name] for each in objects if each[name]) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _check_shape(target: Path, photo: Image.Image) -> None:
    edited = open_image(target)
    if abs(edited.width * photo.height / (edited.height * photo.width) - 1) > SHAPE_TOLERANCE:
        sizes = f"{image_size_text(edited)}, the photograph is {image_size_text(photo)}"
        raise RejectedImage(target, f"the edited picture has another shape: {sizes}")


def _on_white(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The object with edges softened by a pixel, as a photograph of it would have them."""
    return Image.composite(photo, Image.new("RGB", photo.size, "white"), mask.filter(ImageFilter.GaussianBlur(0.7)))


def _categories(names: str | None, file: CocoFile) -> frozenset[str] | None:
    if names is None:
        return None
    known = [str(entry["name"]) for entry in file.categories.values()]
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known[:20])}"
            raise InputError(f"--categories: there is no category {name!r} in the annotation file: {hint}")
    return frozenset(wanted)
