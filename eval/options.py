"""Options that the commands of `eval/` share."""

from typing import Annotated, Literal

import torch
import typer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = "bfloat16" if CUDA else "float32"

DtypeName = Literal["bfloat16", "float32"]

Model = Annotated[str, typer.Option(help="Folder or hub id in the layout of Qwen/Qwen-Image-Edit-2511.")]
Seed = Annotated[int, typer.Option(help="Of the noise, and of the choice of rows.")]
CfgScale = Annotated[
    float | None, typer.Option(help="Guidance of flow matching, 1 for none.", show_default="4 for flow matching")
]
MaxPixels = Annotated[
    int | None, typer.Option(help="Largest area of a picture, in pixels.", show_default="as the adapter was trained")
]
VisionPixels = Annotated[
    int | None,
    typer.Option(help="Area that the text encoder sees, in pixels.", show_default="as the adapter was trained"),
]
Device = Annotated[str, typer.Option(help="Where the models run.", show_default="cuda if there is one")]
Dtype = Annotated[DtypeName, typer.Option(help="Of the weights.", show_default="bfloat16 on cuda, float32 on cpu")]
