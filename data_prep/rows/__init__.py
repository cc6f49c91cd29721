"""Dataset files and image files -> rows: tables of every format, pictures as people have them, folders, duplicates.

Imports data_prep/files and data_prep/errors.
"""
