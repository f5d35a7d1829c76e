"""The engine "sglang": what of SGLang is leaned on, and how it is a guest of the process that trains."""
