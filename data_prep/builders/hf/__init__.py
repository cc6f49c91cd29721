"""A Hugging Face dataset with pictures in it -> files and rows.

Imports data_prep/builders/common.
"""
