"""Names of an adapter's files, for programs that look for them without loading what wrote them."""

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""An adapter, and PEFT's configuration beside it."""
