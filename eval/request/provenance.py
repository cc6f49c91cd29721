"""What a picture's file says of how it was made: the settings for us, standard fields for everybody else's tools."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from data_prep.errors import InputError
from data_prep.files import write_bytes
from data_prep.model.hub_files import HUB_ID
from eval.request.request import EditResult

KEY = "qwen-image-edit"
HUB_FOLDER = "models--"
"""What the folder of a hub id begins with in the hub's cache."""
SOFTWARE = "qwen-image-edit-lora"
NOTICE = "edited by a generative model"

# IPTC Photo Metadata Standard, "Digital Source Type"; the value is "Edited using Generative AI" of the vocabulary
# http://cv.iptc.org/newscodes/digitalsourcetype. Fields without anything of the user's: nothing has to be escaped.
XMP = f"""<?xpacket begin="\N{ZERO WIDTH NO-BREAK SPACE}" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmp:CreatorTool="{SOFTWARE}"
    Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
XMP_KEY = "XML:com.adobe.xmp"
"""The PNG keyword of XMP: XMP specification part 3, 1.1.5."""


def write_png(result: EditResult, sources: Sequence[tuple[str, str]], out: Path) -> None:
    """Writes the picture with its settings, whole or not at all; the same result gives the same bytes.

    Args:
        result: what was made.
        sources: name and digest of each image that it was made of.
        out: the file.
    """
    write_bytes(out, png_bytes(result, sources))


def png_bytes(result: EditResult, sources: Sequence[tuple[str, str]]) -> bytes:
    """The file that `write_png` writes."""
    data = io.BytesIO()
    result.image.save(data, "PNG", pnginfo=_info(result.settings, sources))
    return data.getvalue()


def _info(settings: Mapping[str, Any], sources: Sequence[tuple[str, str]]) -> PngInfo:
    images = [{"name": name, "digest": digest} for name, digest in sources]
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    info.add_text("Comment", NOTICE)
    info.add_itxt(XMP_KEY, XMP)
    info.add_itxt(
        KEY, json.dumps({"notice": NOTICE, **settings, "images": images}, ensure_ascii=False, allow_nan=False)
    )
    return info


def without_places(settings: Mapping[str, Any], adapters: Mapping[str, str]) -> dict[str, Any]:
    """Settings for others to read: models by their names, where the settings themselves have places of this machine.

    Digests and fingerprints stay, so `--repeat` finds out whether a name means the same model.

    Args:
        adapters: resolved file -> name, of those that have one; another is called as its file or its folder.
    """
    shown = dict(settings)
    shown["model"] = model_name(settings["model"])
    shown["adapters"] = [
        each | {"path": adapters.get(str(Path(each["path"]).resolve())) or model_name(each["path"])}
        for each in settings["adapters"]
    ]
    if "depth_model" in settings:
        shown["depth_model"] = settings["depth_model"] | {"path": model_name(settings["depth_model"]["path"])}
    return shown


def model_name(place: str) -> str:
    """What a model is called, whatever folder it is in: its hub id, or the last part of its path."""
    if HUB_ID.fullmatch(place) and not Path(place).exists():
        return place
    path = Path(place).expanduser().absolute()
    cached = [part.split("--", 2)[1:] for part in path.parts if part.startswith(HUB_FOLDER)]  # models--OWNER--NAME
    return "/".join(cached[-1]) if cached else path.name


def pixel_digest(image: Image.Image) -> str:
    """Identifies a picture by its size and pixels, whatever file it came from."""
    content = f"{image.mode} {image.size}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_png(path: Path) -> dict[str, Any]:
    """The settings of a picture that `write_png` wrote; `images` are its sources' names and digests.

    Raises:
        InputError: there is no such PNG, or it has no settings: other programs drop them when they save.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            text = image.text.get(KEY)
        settings = json.loads(text) if text else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not a readable PNG: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} does not say how it was made: it was not written here, or saved by another program")
    return settings


def numbered(name: str, count: int) -> list[str]:
    """`result.png`, or `result-1.png`, `result-2.png`, … of several pictures."""
    stem, _, suffix = name.rpartition(".")
    return [f"{stem}-{number}.{suffix}" for number in range(1, count + 1)] if count > 1 else [name]
