"""What is told of the scores: pages, the model card, tables for Weights & Biases, the hub.

Imports eval/scores and eval/request.
"""
