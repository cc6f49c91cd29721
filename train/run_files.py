"""Names of what a run writes, for programs that look for it without loading what wrote it."""

CHECKPOINTS, LATEST = "checkpoints", "latest"
"""The folder of a run's checkpoints, and the file in it with the newest one's name."""
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""An adapter, and PEFT's configuration beside it."""
