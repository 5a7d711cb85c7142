"""Calibration: from a model and some text to a sidecar file with bases, means and ranks.

Modules (import them directly, this package imports nothing by itself):

``sidecar``      the sidecar file as an object: read, validate, re-plan
``sidecar_write``  writing it: deterministic bytes, atomic rename
``gguf_read``    bounds-checked reader of GGUF headers
``fingerprint``  the hash that ties a sidecar to its model
``plan``         how ranks are shared out over groups, K and V
``sizes``        bytes per token and predicted cache sizes
``solve``        Gram sums to bases, means and spectra
``text``         calibration text from files
``sample``       calibration text written by the model itself
``calibrate``    runs the model and collects Gram sums
``hf``           Hugging Face folder to GGUF, by upstream's converter
``pipeline``     all of it in one call; ``ensure_sidecar`` for first use
"""
