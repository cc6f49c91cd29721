"""Base models other than Qwen-Image-Edit, through diffusers' pipelines."""
