"""Many edits: a table's rows become jobs, over ranks, continued where they stopped.

Imports eval/bases, eval/qwen and eval/request.
"""
