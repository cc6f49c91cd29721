"""A folder as diffusers' `custom_pipeline` wants it: `pipeline.py` alone, which imports nothing of the project."""
