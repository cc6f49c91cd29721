"""Folders of sources and targets, matched by file name.

Imports data_prep/builders/common.
"""
