"""One process or many: who they are, how gradients and weights come together, and DeepSpeed's settings.

Imports train/model.
"""
