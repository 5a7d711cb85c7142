"""What a GGUF model file tells of itself: header, shape, fingerprint. The model is not loaded."""
