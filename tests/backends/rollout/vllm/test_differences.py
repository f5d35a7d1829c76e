"""What versions of vLLM do in different ways."""

from __future__ import annotations

import pytest

from lightrft.backends.rollout.vllm import differences
from lightrft.backends.rollout.vllm.differences import reached_names, takes_patterns

EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("version", [(0, 31, 0), (0, 31, 0, 1), (0, 32, 0)])
def test_names_of_experts_are_those_of_the_parameters(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    """Before 0.32 vLLM leaves a part of experts' names out, which is put back; a name that has it stays."""
    monkeypatch.setattr(differences, "installed_version", (lambda: version))
    left_out = f"{EXPERTS}.w2_weight" if version < (0, 32) else f"{EXPERTS}.routed_experts.w2_weight"
    wanted = {f"{EXPERTS}.routed_experts.w13_weight", f"{EXPERTS}.routed_experts.w2_weight", "lm_head.weight"}
    assert reached_names({f"{EXPERTS}.routed_experts.w13_weight", left_out, "lm_head.weight"}) == wanted


@pytest.mark.parametrize(("version", "wanted"), [((0, 31, 0), False), ((0, 31, 0, 1), False), ((0, 32, 0), True)])
def test_patterns_of_adapters_are_looked_at_from_0_32_on(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], wanted: bool
) -> None:
    """Before 0.32 vLLM would compute such layers with the rank and scale of the others."""
    monkeypatch.setattr(differences, "installed_version", (lambda: version))
    assert takes_patterns() is wanted
