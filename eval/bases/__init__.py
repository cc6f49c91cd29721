"""Base models other than Qwen-Image-Edit, through diffusers' pipelines. `auto` opens whichever base a folder holds.

Imports eval/qwen and eval/request.
"""
