"""Calibration: from a model and some text to a sidecar file with bases and spectra; from these to a cache's plan.

Modules (import them directly, this package imports nothing by itself):

``sidecar``      the sidecar file as an object: read, validate
``sidecar_write``  writing it: deterministic bytes, atomic rename
``gguf_read``    bounds-checked reader of GGUF headers
``fingerprint``  the hash that ties a sidecar to its model
``knob``         the one number that decides a cache's size
``coef_types``   what numbers cost in each type, and what they lose
``plan``         how directions and bits are shared out over groups, K and V
``waterfill``    the search behind it
``cache_plan``   a whole cache from a knob: segments, window, types
``model_shape``  sizes of K and V from a model's metadata
``sizes``        bytes per token and predicted cache sizes
``group_choice`` group sizes compared
``solve``        Gram sums to bases, means and spectra
``text``         calibration text from files
``sample``       calibration text written by the model itself
``calibrate``    runs the model and collects Gram sums
``hf``           Hugging Face folder to GGUF, by upstream's converter
``pipeline``     all of it in one call; ``ensure_sidecar`` for first use
"""
