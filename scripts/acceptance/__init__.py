"""Acceptance on real weights: `bash scripts/accept.sh [MODEL]`. docs/acceptance.md explains it.

accept.py     the command: which parts are due, each in a process of its own
findings.py   what a part has found, the table and the page
fidelity.py   files, velocity, prompts, vae: the model, and ours against diffusers on it
training.py   cache, lbm, sft, resume: the recipes, by the real launcher
using.py      edits, speed: pictures, and a step against DiffSynth's
"""
