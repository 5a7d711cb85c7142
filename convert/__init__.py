"""Calibration: from a model and some text to a sidecar file with bases and spectra.

Modules (import them directly, this package imports nothing by itself):

``pipeline``     all of it in one call; ``ensure_sidecar`` for first use
``settings``     what a conversion can be asked for
``hf``           Hugging Face folder to GGUF, by upstream's converter
``engine``       the model on a plain f16 cache
``text``         calibration text from files, the package's among them
``sample``       calibration text written by the model itself
``prompts``      what that text begins with
``calibrate``    runs the model and collects Gram sums
``capture``      the sums, by the native library
``solve``        Gram sums to bases, means and spectra
``weigh``        what a conversion measures about groups, or about single layers
``sensitivity``  how much the model minds what is lost in them
``layer_scales`` scales that let a group's errors weigh the same in all layers
"""
