"""Exceptions that xkv-gguf raises. Every message is one line: object, found, expected, fix.

Where `llama_cpp.Llama` raises an exception too, ours is one of its class, so that code which was written for it goes on
to work: ValueError where an object cannot be made, RuntimeError where a batch, a state or an adapter is not taken.
"""

from __future__ import annotations


class XkvWarning(UserWarning):
    """Something is done otherwise than it was asked for."""


class XkvError(Exception):
    """Base of all errors that a user can cause or repair."""


class ModelError(XkvError, ValueError):
    """The model file is missing, unreadable, or not a GGUF model."""


class AdapterError(ModelError, RuntimeError):
    """The LoRA adapter is missing, unreadable, or of another architecture."""


class UnsupportedError(XkvError, NotImplementedError, ValueError):
    """The model, setting or operation is not supported with an xkv cache."""


class SidecarError(XkvError):
    """The sidecar is missing, truncated, damaged, or malformed."""


class SidecarVersionError(SidecarError):
    """The sidecar has another version of the format than the one that is read."""


class SidecarMismatchError(SidecarError):
    """The sidecar belongs to another model."""


class OptionError(XkvError, ValueError):
    """An option has a value that cannot be used."""


class OptionTypeError(OptionError, TypeError):
    """An option has a value of a type that cannot be used."""


class CalibrationError(XkvError):
    """The calibration text or its captured statistics cannot be used."""


class DecodeError(XkvError, RuntimeError):
    """The model could not evaluate a batch, for example because the context is full."""


class ClosedError(XkvError, RuntimeError):
    """The object was closed, and its memory is gone."""


class StateError(XkvError, RuntimeError):
    """A saved state is damaged, is of another model or sidecar, or does not fit into the context."""


class OutOfMemoryError(XkvError, MemoryError, ValueError, RuntimeError):
    """The cache or the context does not fit into memory, or a batch finds none."""


class DeviceError(XkvError):
    """A device cannot be used, or the server of another machine's does not answer."""


class LibraryError(XkvError, ImportError):
    """The patched llama.cpp library is missing, is another build, or is loaded twice."""
