"""The parts of Qwen-Image-Edit: loaded when needed, rounded, offloaded, and the adapters put on and taken off.

Imports eval/request.
"""
