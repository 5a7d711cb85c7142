"""The native library: loading it, its C API, its log, and the arguments that go on to llama_cpp."""
