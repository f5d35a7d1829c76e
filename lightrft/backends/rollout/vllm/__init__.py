"""The engine "vllm": what of vLLM is leaned on, and how it is a guest of the process that trains."""
