"""Captions that lie beside pictures: `NAME.txt`, or `NAME.json` with more than the instruction."""

import json
from dataclasses import dataclass
from pathlib import Path

from data_prep.builders.common.prompts import read_text
from data_prep.rows.images import RejectedImage
from data_prep.rows.tables import BadRow

ENDINGS = (".json", ".txt")
"""What a caption file may be; of two with the same name the first is read, since it can say more."""


@dataclass(frozen=True)
class Caption:
    """What a caption file says of a row; empty text where it says nothing."""

    prompt: str = ""
    negative_prompt: str = ""
    tag: str = ""
    group: str = ""


def read_caption(path: Path) -> Caption:
    """A .txt file is the instruction, whole; a .json file holds one object with the key `prompt` or `caption`, and perhaps
    `negative_prompt`, `tag` and `group`. Its other keys are somebody else's.

    Raises:
        RejectedImage: it cannot be read, or is not such a file.
    """
    try:
        text = read_text(path)
        return _from_json(text) if path.suffix.lower() == ".json" else Caption(prompt=text)
    except BadRow as error:
        raise RejectedImage(path, str(error)) from None


def _from_json(text: str) -> Caption:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRow(f"must hold a JSON object with the key prompt, not {type(values).__name__}")
    if "prompt" in values and "caption" in values:
        raise BadRow("has both keys, prompt and caption: keep one")
    names = {"prompt": "caption" if "caption" in values else "prompt"}
    return Caption(**{field: _text(values, names.get(field, field)) for field in Caption.__dataclass_fields__})


def _text(values: dict, name: str) -> str:
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # \ud800 in JSON
        raise BadRow(f"{name} is not valid Unicode text") from None
    return value.strip()
