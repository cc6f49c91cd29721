"""Paired augmentation: further versions of a row, each with a flip and a crop that its source, target and mask have in common.

What is drawn depends on the row's id and the version's number alone, so that a version is the same in every run.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageOps

from data_prep.rows.images import MASK_TOLERANCE

SIDED = re.compile(
    r"\b((left|right)(most|wards?|y)?|(anti|counter)?-?clockwise|mirror\w*|flip\w*|(east|west)(ern)?)\b|\b(words?|texts?|letters?|letterings?|captions?|fonts?|digits?|numbers?)\b"
    r"|\b(signs?|logos?|labels?|slogans?|titles?|\w*writ\w+|spell\w*|says?|reads?|typograph\w+|watermarks?|subtitles?)\b"
    r"|[\"“”«»「」『』‘‚‹›]|(?<!\w)['’]|左|右|顺时针|逆时针|镜像|翻转|文字|文本|字母|数字|字体|标志|标识|标题|标语|水印|字幕|写|字",
    re.IGNORECASE,
)
"""What an instruction says that is another thing in a mirror: sides, turns, and writing. English and Chinese.
A single quotation mark counts where no letter is before it: behind one it is an apostrophe."""


class Box(NamedTuple):
    """A part of a picture, in fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


class Pictures(NamedTuple):
    """The images of a row."""

    target: Image.Image
    references: list[Image.Image]
    mask: Image.Image | None


@dataclass(frozen=True)
class Augmentation:
    """One version of a row, by what it does to the row's pictures."""

    number: int
    """From 1."""
    flip: bool
    """Mirror all pictures."""
    side: float = 1.0
    """Share of each side that the crop keeps, in (0, 1]; 1: no crop."""
    across: float = 0.0
    """Where the crop lies, from the left (0) to the right (1)."""
    down: float = 0.0
    """The same from the top."""

    def box(self, edit: Box | None) -> Box:
        """What the crop keeps. It is moved, and enlarged, as far as it must be to keep all of the edit."""
        side = self.side if edit is None else max(self.side, edit.right - edit.left, edit.bottom - edit.top)
        left, top = self.across * (1 - side), self.down * (1 - side)
        if edit is not None:
            left, top = min(max(left, edit.right - side), edit.left), min(max(top, edit.bottom - side), edit.top)
        return Box(left, top, left + side, top + side)

    def __call__(
        self, target: Image.Image, references: Sequence[Image.Image], mask: Image.Image | None, bridge: int
    ) -> Pictures:
        """Flips all pictures; crops target, mask, and the source that the target is aligned with.

        Other references are no views of the same scene and stay whole. Where the source has another shape than the target,
        nothing is cropped.

        Args:
            target: the picture after the edit.
            references: the sources; none for text to image.
            mask: mode L, 255 = background, of the target's shape.
            bridge: which of the references shows the scene of the target.
        """
        references = list(references)
        if self.side < 1 and (not references or _same_shape(references[bridge], target)):
            box = self.box(mask and _edit(mask))
            target, mask = _cropped(target, box), mask and _cropped(mask, box)
            if references:
                references[bridge] = _cropped(references[bridge], box)
        if self.flip:
            target, mask = ImageOps.mirror(target), mask and ImageOps.mirror(mask)
            references = [ImageOps.mirror(each) for each in references]
        return Pictures(target, references, mask)


@dataclass(frozen=True)
class Augment:
    """How many versions of each row there are beside the row itself, and what they may do."""

    copies: int = 0
    """Further versions of each row."""
    flip: bool = True
    """Mirror every other one, the first to begin with, where the instruction allows it."""
    crop: float = 1.0
    """Smallest share of each side that a crop keeps, in (0, 1]; 1: no crop."""

    def versions(self, id: str, prompt: str) -> Iterator[Augmentation]:
        """The further versions of a row that differ from it and from each other: without crops there is the mirrored one
        alone, if any."""
        flips = self.flip and not SIDED.search(prompt)
        if self.crop == 1:
            if flips and self.copies:
                yield Augmentation(1, True)
            return
        for number in range(1, self.copies + 1):
            draws = hashlib.blake2b(f"{id} {number}".encode(), digest_size=24).digest()
            side, across, down = (int.from_bytes(draws[i : i + 8], "little") / 2**64 for i in (0, 8, 16))
            yield Augmentation(number, flips and number % 2 == 1, self.crop + (1 - self.crop) * side, across, down)


def _same_shape(one: Image.Image, other: Image.Image) -> bool:
    return abs(one.width * other.height / (one.height * other.width) - 1) <= MASK_TOLERANCE


def _edit(mask: Image.Image) -> Box | None:
    """The box around all that is not background."""
    found = mask.point([255] * 128 + [0] * 128).getbbox()
    if found is None:
        return None
    left, top, right, bottom = found
    return Box(left / mask.width, top / mask.height, right / mask.width, bottom / mask.height)


def _cropped(image: Image.Image, box: Box) -> Image.Image:
    left, right = (round(side * image.width) for side in (box.left, box.right))
    top, bottom = (round(side * image.height) for side in (box.top, box.bottom))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
