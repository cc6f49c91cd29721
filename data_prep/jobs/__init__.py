"""Long work on many files: in order, with its progress, continued where it stopped, on processes or a Ray cluster.

Imports data_prep/rows.
"""
