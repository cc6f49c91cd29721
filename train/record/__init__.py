"""What a run writes down and continues from: checkpoints, metrics, what the result depends on, how it went.

Imports train/parallel, train/model, the optimizers and the configuration.
"""
