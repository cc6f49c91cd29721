"""Builds, splits and checks dataset files.

python data_prep/run.py COMMAND --help
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import typer

from data_prep.cli import run_app

COMMANDS = {
    "pairs": ("data_prep.builders.pairs.command", "Folders of sources and targets, matched by file name."),
    "table": ("data_prep.builders.table", "A CSV, TSV, JSONL or Parquet file with columns of any names."),
    "hf": ("data_prep.builders.hf.command", "A Hugging Face dataset with images in it."),
    "coco": ("data_prep.builders.coco.command", "A COCO annotation file and its image folder."),
    "overlay": ("data_prep.builders.overlay.command", "Texts or images laid over photographs, to be added or removed."),
    "synth": ("data_prep.builders.synth.command", "Perfect pairs made of plain photographs."),
    "mask": (
        "data_prep.builders.mask.command",
        "Background masks from the difference of pairs, or given masks reworked.",
    ),
    "split": ("data_prep.builders.split.command", "Training and validation rows, whose content never overlaps."),
    "cache": ("data_prep.cache_command", "What a cache folder holds, and making room in it."),
    "check": ("data_prep.check.check", "What is wrong with a dataset, before a GPU hour is spent."),
}
"""Name -> the module of the function `command`, which is imported only when it is wanted, and a line of help."""


def main() -> None:
    app = typer.Typer(
        help=__doc__.splitlines()[0] if __doc__ else None, add_completion=False, pretty_exceptions_enable=False
    )
    wanted = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = import_module(module).command if name == wanted else lambda: None
        app.command(name, help=command.__doc__, short_help=line)(command)
    run_app(app)


if __name__ == "__main__":
    main()
