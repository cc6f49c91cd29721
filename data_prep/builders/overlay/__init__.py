"""Texts and pictures laid over photographs.

Imports data_prep/builders/common, and the annotations of data_prep/builders/coco.
"""
