"""Training: from a configuration to checkpoints and an adapter. `run.py` is the command.

Rooms, from the top: phases and sweep; loop and builders; record; plan and parallel; model. Imports data_prep and losses.
"""
