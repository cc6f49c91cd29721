"""What is measured: the validation during training, what an evaluation edits and records, how sure a mean is.

Imports eval/tables, eval/qwen and eval/request.
"""
