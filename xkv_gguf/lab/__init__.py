"""The laboratory: what caches cost in accuracy, speed and memory, measured side by side."""
