"""Into the tools of others: a pipeline for diffusers, merged transformers, other names for adapters, and what a file holds.

Imports eval/qwen and eval/request. `qwen_edit/pipeline.py` imports nothing of the project: it is uploaded beside adapters.
"""

from pathlib import Path

PIPELINE = Path(__file__).parent / "qwen_edit" / "pipeline.py"
"""For diffusers' `custom_pipeline`."""
