"""Caches and trains.

    accelerate launch train/run.py +exp=lbm_2511 data.dataset=pairs.json data.root=photos run_dir=runs/mine

To continue a run that was stopped, give the same command again.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from data_prep.errors import InputError, exit_codes
from train.config import CONFIGS, compose, to_yaml
from train.config.keys import as_text, search


def parse_arguments() -> argparse.Namespace:
    """The command line: Hydra overrides, and `--cfg` to look at the result."""
    lines = {
        file.stem: file.read_text().splitlines()[2].removeprefix("# ")
        for file in sorted((CONFIGS / "exp").glob("*.yaml"))
    }
    experiments = "\n".join(f"  {name:12} {line}" for name, line in lines.items())
    parser = argparse.ArgumentParser(
        usage="accelerate launch train/run.py +exp=NAME [key=value …]",
        description="Caches a dataset and trains a LoRA on it. To resume a stopped run, give the same command again.",
        epilog=f"experiments:\n{experiments}\n\nkeys and their meaning: --keys, or docs/configuration.md; groups: configs/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Settings, such as data.dataset=pairs.json train.num_steps=500.",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--keys",
        metavar="WORD",
        nargs="?",
        const="",
        help="Print the keys whose name or meaning contains WORD, and exit.",
    )
    instead.add_argument("--cfg", action="store_true", help="Print the resolved configuration and exit.")
    instead.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="Run every combination of values, such as python train/run.py -m +exp=NAME adapter.rank=16,64.",
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    with exit_codes():
        arguments = parse_arguments()
        if arguments.multirun:
            from train.sweep import sweep

            sweep(arguments.overrides)
        elif arguments.keys is not None:
            found = search(arguments.keys)
            if not found:
                raise InputError(f"no key has {arguments.keys!r} in its name or meaning: --keys alone prints all")
            print(as_text(found))
        elif arguments.cfg:
            print(to_yaml(compose(arguments.overrides)), end="")
        else:
            config = compose(arguments.overrides)
            from train.phases import run  # heavy: after the configuration, so that a typo is answered at once

            sys.exit(run(config))
