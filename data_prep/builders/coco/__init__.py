"""COCO annotations and photographs -> rows with masks, or objects cut out.

Imports data_prep/builders/common.
"""
