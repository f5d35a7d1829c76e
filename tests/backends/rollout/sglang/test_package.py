"""Which SGLang is refused before anything of it is imported, and whom the platform for CPUs answers."""

from __future__ import annotations

import pkgutil
import tomllib
from pathlib import Path

import pytest

from lightrft.backends.rollout.sglang import package as sglang_package
from lightrft.backends.rollout.sglang.package import require_sglang, undisturbed
from lightrft.backends.rollout.sglang.platform import PLATFORM, activate
from lightrft.config import EngineConfig
from lightrft.errors import MissingPackageError
from lightrft.strategy import ENGINES

_ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, r"package='sglang' is not installed \(0\.5\.23\); make an environment of its own for it, as docs"),
        ("0.5.22", r"package='sglang' is 0\.5\.22 and must be 0\.5\.23; make an environment of its own"),
    ],
)
def test_a_missing_or_other_version_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, found: str | None, said: str
) -> None:
    """The engine is refused when it is chosen, with the version that is known and where to read how it is installed."""

    def find() -> str | None:
        return found

    monkeypatch.setattr(sglang_package, "_version", find)
    with pytest.raises(MissingPackageError, match=said) as refused:
        ENGINES["sglang"](EngineConfig(type="sglang"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("found", ["0.5.23", "0.5.23+cpu"])
def test_the_known_version_passes(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """The version that is known is taken."""

    def find() -> str:
        return found

    monkeypatch.setattr(sglang_package, "_version", find)
    require_sglang()


def test_the_platform_answers_to_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks every package for platforms: ours says no unless it was named, as where our engine starts SGLang."""
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "another")
    assert activate() is None
    with undisturbed():
        assert activate() == "lightrft.backends.rollout.sglang.platform:CpuPlatform"
    assert activate() is None


def test_the_entry_point_has_the_name_that_sglang_is_given() -> None:
    """What the package declares under the name that the engine gives SGLang is the function above."""
    declared = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert pkgutil.resolve_name(declared["sglang.srt.platforms"][PLATFORM]) is activate
