"""Names of what a run writes, for programs that look for it without loading what wrote it."""

CHECKPOINTS, LATEST = "checkpoints", "latest"
"""The folder of a run's checkpoints, and the file in it with the newest one's name."""
METRICS, BEST = "metrics.jsonl", "best.json"
"""A run's numbers, a JSON object a line; and, beside the checkpoints, which one validated best and by what."""
