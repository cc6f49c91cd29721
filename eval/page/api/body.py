"""The body of a request: a form with files, read within the limits of the page."""

import itertools
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from data_prep.rows.rows import MAX_SOURCES
from eval.page.api.refusals import Refusal
from eval.page.limits import Limits

logger = logging.getLogger("page")
FILES = ("image", "mask")
MAX_TEXT = 64 * 1024
"""Bytes of one field that is no file: more than the longest instruction that is taken."""
MAX_FIELDS = 64
MAX_NAME = 100
"""Bytes of a file's name."""
ENVELOPE = MAX_FIELDS * MAX_TEXT
"""Bytes of everything but files."""


@dataclass
class Body:
    """A form as it came, its files in a folder of their own."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    """Name -> its values; one that came as `NAME[]` is called NAME."""
    images: list[Path] = field(default_factory=list)
    mask: Path | None = None


async def read_body(request: Request, limits: Limits, folder: Path) -> Body:
    """Reads a form, and puts its files into a folder under the names that they were sent with.

    Raises:
        Refusal: 413 as soon as it is too large, 400 for what is no form, has a file in an unknown field or breaks off, 500 if
            the disk does not take it.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal(400, "send a form: Content-Type must be multipart/form-data, as of OpenAI's image edits")
    most = (MAX_SOURCES + 1) * limits.max_upload_bytes + ENVELOPE
    _check_length(int(request.headers.get("content-length") or 0), most)
    total = 0

    async def receive() -> Message:
        nonlocal total
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise MultiPartException("the connection was closed before all of it had come")
        total += len(message.get("body", b""))
        if total > most:
            raise MultiPartException("it is too large")  # upon which Starlette closes what it has opened
        return message

    try:
        form = await Request(request.scope, receive).form(
            max_files=MAX_SOURCES + 1, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT
        )
    except OSError as error:
        raise _no_room(error) from error
    except HTTPException as error:
        _check_length(total, most)
        status = 413 if "exceeded maximum size" in error.detail else 400
        raise Refusal(status, f"the form cannot be read: {error.detail}") from None
    try:
        return await _sorted(form, limits, folder)
    except OSError as error:
        raise _no_room(error) from error
    finally:
        await form.close()


def _no_room(error: OSError) -> Refusal:
    """It is not the client's to mend, so the log has it too."""
    logger.error("the files of a request cannot be kept: %s", error)
    return Refusal(500, f"the server cannot keep the files ({error.strerror}): try again later")


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise Refusal(413, f"the request has more than {most / 2**20:.0f} MB: send fewer or smaller files")


async def _sorted(form: FormData, limits: Limits, folder: Path) -> Body:
    body = Body()
    for name, value in form.multi_items():
        name = name.removesuffix("[]")
        if not isinstance(value, UploadFile):
            body.fields.setdefault(name, []).append(value)
            continue
        if name not in FILES:
            raise Refusal(400, f"{name} is a file; files go into {' or '.join(FILES)}", name, "unknown_parameter")
        path = _free(folder, value.filename or name)
        if (value.size or 0) > limits.max_upload_bytes:
            raise Refusal(413, f"{path.name} has more than {limits.max_upload_mb} MB, which is the most", name)
        path.write_bytes(await value.read())
        if name == "image":
            body.images.append(path)
        elif body.mask:
            raise Refusal(400, "there are two masks: send one, of the first image's shape", "mask")
        else:
            body.mask = path
    return body


def _free(folder: Path, name: str) -> Path:
    """A file of the name that it was sent with, as far as a file may have it, behind a number where it is taken."""
    last = re.split(r"[/\\]", name)[-1]
    kept = re.sub(r"[^\w.() -]", "_", last).encode()[-MAX_NAME:].decode(errors="ignore") or "file"
    names = (kept if number == 1 else f"{number}-{kept}" for number in itertools.count(1))
    return next(folder / each for each in names if not (folder / each).exists())
