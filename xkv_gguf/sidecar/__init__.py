"""The sidecar file: reading, writing, finding, describing. FORMAT.md specifies the bytes."""
