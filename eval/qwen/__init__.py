"""Qwen-Image-Edit behind a request: encoding, masks, modes, samplers, control. `weights` is how its parts are loaded.

Imports eval/request.
"""
