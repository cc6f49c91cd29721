"""The model that is trained: the transformer as `velocity = denoiser(latents, sigma, condition)`, and the LoRA on it.

Imports data_prep and losses, and nothing of train/.
"""
