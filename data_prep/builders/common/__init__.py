"""What builders share: the dataset file that they write, columns, instructions, pictures and their names.

Imports no builder.
"""
