"""Rows -> records -> batches: the cache folder, who writes it, and how training reads it.

Imports data_prep/model, data_prep/jobs and data_prep/rows.
"""
