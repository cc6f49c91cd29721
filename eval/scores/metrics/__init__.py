"""Every metric by itself, with its name, unit, direction and source; `catalog` lists them.

Imports eval/scores/fidelity.
"""
