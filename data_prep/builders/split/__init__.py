"""Training and validation rows that share no content.

Imports data_prep/builders/common.
"""
