"""What is measured: the validation during training, what an evaluation records of each picture, how sure a mean is.

Imports eval/qwen and eval/request.
"""
