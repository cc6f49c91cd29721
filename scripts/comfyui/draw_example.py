"""Writes the example workflow, as JSON that ComfyUI opens and as a picture that it opens too.

python -m scripts.comfyui.draw_example
"""

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

FOLDER = Path(__file__).parent / "example_workflows"
NAME = "bridge_edit"
WIDTH, GAP, LINE, MARGIN = 250, 60, 22, 30
ADAPTER = "adapter_model.safetensors"


class Node(NamedTuple):
    """One box."""

    kind: str
    """ComfyUI's name of the node."""
    place: tuple[int, int]
    """Column and top, in pixels."""
    inputs: dict[str, tuple[str, str]]
    """Name -> type, and "box.output" where it comes from."""
    outputs: tuple[tuple[str, str], ...]
    """Name and type."""
    widgets: tuple = ()
    """Values, in order."""


NODES = {
    "unet": Node("UNETLoader", (0, 0), {}, (("MODEL", "MODEL"),), ("qwen_image_edit_2511_bf16.safetensors", "default")),
    "clip": Node(
        *("CLIPLoader", (0, 130), {}, (("CLIP", "CLIP"),)),
        ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", "default"),
    ),
    "vae": Node("VAELoader", (0, 280), {}, (("VAE", "VAE"),), ("qwen_image_vae.safetensors",)),
    "image": Node("LoadImage", (0, 390), {}, (("IMAGE", "IMAGE"), ("MASK", "MASK")), ("photo.png", "image")),
    "lora": Node(
        "LoraLoaderModelOnly", (1, 0), {"model": ("MODEL", "unet.MODEL")}, (("MODEL", "MODEL"),), (ADAPTER, 1.0)
    ),
    "settings": Node(
        *("BridgeSettings", (1, 150), {}, (("settings", "BRIDGE_SETTINGS"), ("text", "STRING")), (ADAPTER,)),
    ),
    "fit": Node(
        *("BridgeFit", (2, 280)),
        {
            "settings": ("BRIDGE_SETTINGS", "settings.settings"),
            "source": ("IMAGE", "image.IMAGE"),
            "reference_2": ("IMAGE", ""),
            "reference_3": ("IMAGE", ""),
        },
        (("source", "IMAGE"), ("references", "BRIDGE_REFERENCES"), ("width", "INT"), ("height", "INT")),
    ),
    "latent": Node(
        "VAEEncode", (3, 0), {"pixels": ("IMAGE", "fit.source"), "vae": ("VAE", "vae.VAE")}, (("LATENT", "LATENT"),)
    ),
    "text": Node(
        *("BridgeEncode", (3, 280)),
        {
            "clip": ("CLIP", "clip.CLIP"),
            "vae": ("VAE", "vae.VAE"),
            "references": ("BRIDGE_REFERENCES", "fit.references"),
        },
        (("CONDITIONING", "CONDITIONING"),),
        ("Remove the sticker from the photograph.", "index_timestep_zero"),
    ),
    "start": Node(
        *("BridgeStart", (4, 0)),
        {
            "model": ("MODEL", "lora.MODEL"),
            "latent": ("LATENT", "latent.LATENT"),
            "settings": ("BRIDGE_SETTINGS", "settings.settings"),
        },
        (("NOISE", "NOISE"),),
    ),
    "guider": Node(
        *("BasicGuider", (4, 280)),
        {"model": ("MODEL", "lora.MODEL"), "conditioning": ("CONDITIONING", "text.CONDITIONING")},
        (("GUIDER", "GUIDER"),),
    ),
    "sampler": Node("KSamplerSelect", (4, 400), {}, (("SAMPLER", "SAMPLER"),), ("euler",)),
    "sigmas": Node("BridgeSigmas", (4, 160), {}, (("SIGMAS", "SIGMAS"),), (4,)),
    "sample": Node(
        *("SamplerCustomAdvanced", (5, 100)),
        {
            "noise": ("NOISE", "start.NOISE"),
            "guider": ("GUIDER", "guider.GUIDER"),
            "sampler": ("SAMPLER", "sampler.SAMPLER"),
            "sigmas": ("SIGMAS", "sigmas.SIGMAS"),
            "latent_image": ("LATENT", "latent.LATENT"),
        },
        (("output", "LATENT"), ("denoised_output", "LATENT")),
    ),
    "decode": Node(
        *("VAEDecode", (6, 100)),
        {"samples": ("LATENT", "sample.output"), "vae": ("VAE", "vae.VAE")},
        (("IMAGE", "IMAGE"),),
    ),
    "save": Node("SaveImage", (7, 100), {"images": ("IMAGE", "decode.IMAGE")}, (), ("bridge",)),
}
"""In an order in which they can run."""


def corner(node):
    """Left and top."""
    return MARGIN + node.place[0] * (WIDTH + GAP), MARGIN + node.place[1]


def height(node):
    """Of its box: a title, its slots, its widgets."""
    return LINE * (1 + max(len(node.inputs), len(node.outputs)) + len(node.widgets)) + 8


def workflow():
    """In the format that ComfyUI's page saves."""
    numbers = {name: number for number, name in enumerate(NODES, start=1)}
    links, into, out_of = [], {}, {}
    for name, node in NODES.items():
        for slot, (field, (kind, origin)) in enumerate(node.inputs.items()):
            if origin:
                box, output = origin.split(".")
                names = [each for each, _ in NODES[box].outputs]
                link = len(links) + 1
                links.append([link, numbers[box], names.index(output), numbers[name], slot, kind])
                into[name, field] = link
                out_of.setdefault((box, output), []).append(link)
    nodes = [
        {
            "id": numbers[name],
            "type": node.kind,
            "pos": list(corner(node)),
            "size": [WIDTH, height(node)],
            "flags": {},
            "order": numbers[name] - 1,
            "mode": 0,
            "inputs": [
                {"name": field, "type": kind, "link": into.get((name, field))}
                for field, (kind, _) in node.inputs.items()
            ],
            "outputs": [
                {"name": field, "type": kind, "links": out_of.get((name, field), []), "slot_index": slot}
                for slot, (field, kind) in enumerate(node.outputs)
            ],
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": list(node.widgets),
        }
        for name, node in NODES.items()
    ]
    own = {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links}
    return {**own, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def slots(name):
    """Where its inputs and outputs are: name -> point."""
    node = NODES[name]
    left, top = corner(node)
    found = {("in", field): (left, top + LINE * (place + 1.5)) for place, field in enumerate(node.inputs)}
    return found | {("out", f): (left + WIDTH, top + LINE * (place + 1.5)) for place, (f, _) in enumerate(node.outputs)}


def picture():
    """The same as boxes and lines; ours are blue."""
    right = max(corner(node)[0] + WIDTH for node in NODES.values()) + MARGIN
    bottom = max(corner(node)[1] + height(node) for node in NODES.values()) + MARGIN
    image = Image.new("RGB", (right, bottom), "#202124")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for name, node in NODES.items():
        for field, (_, origin) in node.inputs.items():
            if origin:
                box, output = origin.split(".")
                draw.line([slots(box)["out", output], slots(name)["in", field]], "#8ab4f8", 2)
    for name, node in NODES.items():
        left, top = corner(node)
        colour = "#274b7a" if node.kind.startswith("Bridge") else "#3c4043"
        draw.rounded_rectangle([left, top, left + WIDTH, top + height(node)], 6, colour, "#9aa0a6")
        draw.text((left + 8, top + 3), node.kind, "#ffffff", font)
        for (side, field), (x, y) in slots(name).items():
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], "#8ab4f8")
            at, anchor = (x + 9, "lm") if side == "in" else (x - 9, "rm")
            draw.text((at, y), field, "#e8eaed", font, anchor=anchor)
        first = top + LINE * (1 + max(len(node.inputs), len(node.outputs)))
        for place, value in enumerate(node.widgets):
            text = str(value) if len(str(value)) <= 32 else f"{str(value)[:31]}…"
            draw.text((left + 8, first + LINE * (place + 0.5)), text, "#fdd663", font, anchor="lm")
    return image


def write(folder=FOLDER):
    """Both files; the picture carries the workflow as ComfyUI's own do."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(workflow(), indent=1)
    (folder / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    info = PngInfo()
    info.add_text("workflow", json.dumps(workflow()))
    picture().save(folder / f"{NAME}.png", pnginfo=info, optimize=True)


if __name__ == "__main__":
    write()
