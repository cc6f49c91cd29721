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
    "hf": ("data_prep.builders.hf.command", "A Hugging Face dataset that contains images."),
    "coco": ("data_prep.builders.coco.command", "A COCO annotation file and its image folder."),
    "overlay": (
        "data_prep.builders.overlay.command",
        "Photographs with texts or images laid over them, to add or to remove.",
    ),
    "synth": ("data_prep.builders.synth.command", "Pairs with exact masks, made from plain photographs."),
    "mask": (
        "data_prep.builders.mask.command",
        "Background masks from the difference of each pair, or from existing masks.",
    ),
    "split": (
        "data_prep.builders.split.command",
        "Split the rows into training and validation without shared content.",
    ),
    "cache": ("data_prep.cache_command", "List the datasets in a cache folder, or delete some of them."),
    "check": ("data_prep.check.check", "Find the mistakes in a dataset before you train on it."),
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
