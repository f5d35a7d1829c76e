"""Whether the packages behind the models are installed."""

from __future__ import annotations

import importlib

from lightrft.errors import MissingPackageError

__all__ = ["require_transformers"]


def require_transformers() -> None:
    """Import transformers and tokenizers, or say how to install them.

    Raises:
        MissingPackageError: one of them cannot be imported.
    """
    for package in ("transformers", "tokenizers"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"package={package!r} cannot be imported ({error}); run: pip install 'lightrft[hf]'."
            ) from error
