"""What the check tells: `check.json`, tables on the terminal, the page `check.html`.

Imports what found it: data_prep/check/survey, findings and measures.
"""
