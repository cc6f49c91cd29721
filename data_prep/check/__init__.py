"""What is wrong with a dataset: rows are measured, judged, and told of.

Imports all of data_prep but `run`.
"""
