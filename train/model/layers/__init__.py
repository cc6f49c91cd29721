"""What stands in place of a linear layer that an adapter changes: LoRA and LoKr. Imports `train/model/quantize.py` alone."""
