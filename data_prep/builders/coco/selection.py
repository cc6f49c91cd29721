"""Which images and annotations of a COCO file become rows, and which edited picture belongs to which."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.builders.coco.annotations import COCO_DIGITS, CocoFile, CocoImage, is_utf8
from data_prep.jobs.items import Item
from data_prep.rows.folders import list_images
from data_prep.rows.rows import RejectedRow, resolve_path
from data_prep.rows.tables import BadRow

PerName = Literal["image", "annotation"]


@dataclass(frozen=True)
class Targets:
    """Edited pictures by name."""

    paths: dict[str, list[Path]]
    """By name without ending."""
    used: set[str]
    """Names that were asked for."""

    @classmethod
    def of(cls, folder: Path) -> "Targets":
        """The targets in a folder. Raises `InputError` if there are none."""
        paths: dict[str, list[Path]] = {}
        for path in list_images(Path(os.path.abspath(folder))):
            paths.setdefault(path.stem, []).append(path)
        return cls(paths, set())

    def find(self, image: CocoImage, ending: str) -> Path | None:
        """The picture called as the image or its id, and `ending`. Raises `BadRow` if several files may be meant."""
        found = [name + ending for name in _names(image) if name + ending in self.paths]
        self.used.update(found)
        files = [path for name in found for path in self.paths[name]]
        if len(files) > 1:
            raise BadRow(f"several edited pictures may be its target: {', '.join(map(str, files[:3]))}")
        return files[0] if files else None

    def leave(self, image: CocoImage) -> None:
        """The image is rejected: its picture is not to be reported too."""
        self.used.update(_names(image))

    def unused(self) -> Iterator[RejectedRow]:
        """The pictures that no row asked for."""
        rest = sorted(path for name, paths in self.paths.items() if name not in self.used for path in paths)
        for number, path in enumerate(rest, start=1):
            yield RejectedRow(number, path.stem, str(path), "no image or wanted annotation has the name of this target")


@dataclass(frozen=True)
class Choice:
    """Which images and annotations become rows."""

    file: CocoFile
    folder: Path
    per: PerName
    wanted: frozenset[str] | None
    """Names of categories; None: all."""
    needs_objects: bool
    crowds: bool
    """Whether groups that are annotated as one count as objects."""

    def items(self, targets: Targets | None) -> Iterator[Item | RejectedRow]:
        """An item for each row, then the edited pictures that none asked for. What gives no row is counted, and said."""
        yield from self.file.rejected
        without_object = without_target = 0
        for image in self.file.images.values():
            try:
                objects = self._objects(image)
                photo = resolve_path(image.file_name, "file_name", self.folder)
                if self.needs_objects and not objects:
                    without_object += 1
                for ending, shown in self._groups(objects):
                    target = targets.find(image, ending) if targets else None
                    if targets and target is None:
                        without_target += 1
                    else:
                        yield _item(image, ending, shown, photo, target)
            except BadRow as error:
                if targets:
                    targets.leave(image)
                yield RejectedRow(image.number, image.id, image.file_name, str(error))
        if targets:
            yield from targets.unused()
        for count, what in (
            (without_object, "images have no wanted object"),
            (without_target, "have no edited picture"),
        ):
            if count:
                print(f"{count} {what}: they make no rows")

    def _objects(self, image: CocoImage) -> list[dict[str, Any]]:
        for each in image.objects:
            if not isinstance(each["category"], str):
                raise BadRow(f"its annotation {each['id']} is of the unknown category_id {each['category_id']}")
            if not is_utf8(f"{each['category']}{each['supercategory']}"):
                raise BadRow(f"the category of its annotation {each['id']} is not UTF-8 text")
        return [
            each
            for each in image.objects
            if (self.wanted is None or each["category"] in self.wanted) and (self.crowds or not each["iscrowd"])
        ]

    def _groups(self, objects: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """What one row shows, and how its name ends."""
        if self.per == "annotation":
            ids = [each["id"] for each in objects]
            if repeated := [id for id in ids if not id or ids.count(id) > 1]:
                raise BadRow(
                    f"its annotations must have an id each for --per annotation, but several have {repeated[0]!r}"
                )
            yield from ((f"_{each['id']}", [each]) for each in objects)
        elif objects or not self.needs_objects:
            yield "", objects


def _names(image: CocoImage) -> list[str]:
    """What edited pictures of an image may be called, without ending; each once."""
    return list(dict.fromkeys([Path(image.file_name).stem, image.id, image.id.zfill(COCO_DIGITS)]))


def _item(image: CocoImage, ending: str, objects: list[dict[str, Any]], photo: Path, target: Path | None) -> Item:
    values = {
        "image_id": image.id,
        "file_name": image.file_name,
        "size": image.size,
        "objects": [
            {name: each[name] for name in ("id", "category", "supercategory", "segmentation")} for each in objects
        ],
        "captions": image.captions,
    }
    return Item(image.number, image.id + ending, (photo, target) if target else (photo,), values)
