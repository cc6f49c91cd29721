"""What a run will need before anything is loaded: memory by part, time and disk, on which GPUs.

Imports train/model, the optimizers and the configuration.
"""
