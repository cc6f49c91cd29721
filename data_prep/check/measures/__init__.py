"""What is measured of each row, without limits, and how a million measurements are kept.

Imports data_prep/jobs and data_prep/rows.
"""
