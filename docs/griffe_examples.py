"""The section "Example:" of our docstrings, under the name that griffe reads as a session of Python."""

from __future__ import annotations

import re

import griffe

__all__ = ["SingularExample"]


class SingularExample(griffe.Extension):  # griffe's hook is a method of a class of its own
    """Renames the section in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change one object's docstring; griffe calls it for each.

        Args:
            obj: a module, class, function or attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
