"""The base model's own rules: its directory, the sizes that it wants, its two encoders.

Imports data_prep/rows.
"""
