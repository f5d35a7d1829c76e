"""Imports vLLM, for a process whose forks are ranks: `forked_ranks.forks`."""

from __future__ import annotations

from importlib import import_module

from lightrft.backends.rollout.vllm.package import import_vllm, undisturbed

import_vllm()
with undisturbed():
    for name in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3"):
        import_module(name)
