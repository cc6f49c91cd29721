"""What is asked of an edit and what comes back, the same for every base model: options, sizes, where models are, what files say.

Imports no other room of eval/.
"""
