"""What stands in the place of a linear layer that an adapter changes: LoRA, and LoKr. Imports the formats of frozen weights alone."""
