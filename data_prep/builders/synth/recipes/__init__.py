"""One module for each kind of edit, which works on a `Draft`.

Imports `draft` and `regions`.
"""
