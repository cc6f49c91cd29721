"""Takes adapters into other programs: merges them into the transformer, renames their tensors, says what a file holds.

    python eval/export.py merge --model Qwen/Qwen-Image-Edit-2511 --adapter runs/mine --out merged
    python eval/export.py convert runs/mine --to kohya --out mine.safetensors
    python eval/export.py inspect mine.safetensors

docs/use_elsewhere.md has the whole.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.cli import run_app
from data_prep.errors import InputError
from eval.exports.forms import FormName, GGUFName, NumbersName
from eval.request.knobs import AdapterUse
from eval.request.lookup import find_model
from eval.request.options import option
from train.record.lookup import find_adapter

if TYPE_CHECKING:
    import torch

Dtype = Annotated[
    NumbersName | None, typer.Option(help="Data type of the written weights.", show_default="as they are")
]
Named = Annotated[str, typer.Argument(help="The adapter: a file, a checkpoint, a run, or OWNER/NAME on the hub.")]


def merge(
    *,
    model: Annotated[str, typer.Option(help="Base model: a folder, also one below $MODEL_DIR, or a hub id.")],
    adapter: Annotated[
        list[AdapterUse],
        typer.Option(
            parser=option(AdapterUse.parse),
            metavar="PATH[:WEIGHT]",
            help="LoRA to merge: run folder, checkpoint or safetensors file, also below $CHECKPOINT_DIR. Repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create, or the file to write with --gguf.")],
    dtype: Dtype = None,
    shard_size: Annotated[
        str, typer.Option(help="Largest size of a file. 1TB gives a single file, which ComfyUI needs.")
    ] = "5GB",
    whole: Annotated[
        bool, typer.Option("--whole", help="Also copy the base model's other parts, for a complete model directory.")
    ] = False,
    gguf: Annotated[
        GGUFName | None,
        typer.Option(help="Write a GGUF file with the blocks' matrices in this type.", show_default="no"),
    ] = None,
) -> None:
    """Writes the transformer with adapters inside, one tensor at a time."""
    _check_merge(out, dtype, whole, gguf)
    source = find_model(model)
    from data_prep.model.directory import ModelDirectory
    from data_prep.model.hub_files import fetch
    from eval.exports.merging import prepare_merge

    directory = ModelDirectory.resolve(source) if whole else ModelDirectory(fetch(source, ["transformer/*"]))
    ready = prepare_merge(directory, adapter, _dtype(dtype))
    if gguf:
        ready.write_gguf(out, gguf)
    else:
        ready.write_folder(out, shard_size, whole)
    if ready.header.get("objective") == "lbm":
        print("note: this is a bridge, whose sampler starts at the source: docs/use_elsewhere.md", file=sys.stderr)
    print(out)


def convert(
    adapter: Named,
    *,
    to: Annotated[
        FormName,
        typer.Option(
            help="Names to write: kohya's, those of diffusers, or common ones that diffusers, DiffSynth and ComfyUI read."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    dtype: Dtype = None,
) -> None:
    """Writes an adapter under another program's names."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, got {out}")
    path = find_adapter(adapter)
    from eval.exports.adapter_names import convert as convert_names

    print(f"{out}: {convert_names(path, to, out, _dtype(dtype))} modules")


def inspect(adapter: Named, *, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Says what an adapter's file holds, and what of it other programs would ignore."""
    path = find_adapter(adapter)
    from eval.exports.inspection import inspect_adapter

    found = inspect_adapter(path)
    print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False) if as_json else found.as_text())


def _check_merge(out: Path, dtype: str | None, whole: bool, gguf: str | None) -> None:
    """Finds what contradicts itself before torch is there."""
    if gguf and (dtype or whole):
        raise InputError("--gguf says what the numbers are and makes one file: leave out --dtype and --whole")
    if gguf and out.suffix != ".gguf":
        raise InputError(f"with --gguf, --out must end in .gguf, got {out}")
    if gguf and find_spec("gguf") is None:
        raise InputError("a GGUF file needs the package gguf: pip install gguf")
    if out.exists():
        raise InputError(f"--out {out} is there already: choose another name, or remove it")


def _dtype(name: NumbersName | None) -> "torch.dtype | None":
    import torch

    return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def main() -> None:
    summary = __doc__.splitlines()[0] if __doc__ else None
    app = typer.Typer(help=summary, add_completion=False, pretty_exceptions_enable=False)
    for command in (merge, convert, inspect):
        app.command()(command)
    run_app(app, interrupted="nothing was written; the same command begins again")


if __name__ == "__main__":
    main()
