"""Perfect pairs made of plain photographs: `recipes` has a module for each kind of edit, `catalog` lists and combines them.

Imports data_prep/builders/common, and from data_prep/builders/split how content is told.
"""
