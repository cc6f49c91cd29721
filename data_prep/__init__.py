"""From what people have to cached records. `run.py` is the command.

Rooms, from the top: check; builders; cache; model and jobs; rows; and files and errors, which everybody uses. Imports losses.
"""
