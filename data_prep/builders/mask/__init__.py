"""Masks from the difference of source and target, or given ones reworked.

Imports data_prep/builders/common.
"""
