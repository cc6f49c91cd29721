"""From what people have to cached records. `run.py` is the command.

Rooms, from the top: check; builders; cache; model and jobs; rows; and files and errors, which everybody uses. Imports losses.
"""

import logging
import sys
from importlib.util import find_spec

if find_spec("torch") is None:
    print(
        "error: this Python does not have the project's packages: enter the environment with `source .venv/bin/activate`, "
        "or begin the command with `uv run`",
        file=sys.stderr,
    )
    raise SystemExit(2)

# What libraries say of themselves when they are imported on a machine without a GPU, which nobody can act upon.
_NOTICES = {"DeepSpeed": "Setting accelerator to CPU", "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit"}
for _name, _notice in _NOTICES.items():
    logging.getLogger(_name).addFilter(lambda record, notice=_notice: notice not in record.getMessage())
