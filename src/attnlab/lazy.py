"""Names of a package that are imported at first use, so that importing it costs next to nothing."""

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package in which a lazy name wins over the module of the same name that holds it (`attend`, `scan`, `tap`)."""

    _homes: Mapping[str, str]
    _rooms: Collection[str]

    def __getattr__(self, name: str) -> Any:
        if name in self._homes:
            value = getattr(import_module(self._homes[name]), name)
        elif name in self._rooms:
            value = import_module(f"{self.__name__}.{name}")
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module attnlab.attend would otherwise put it where the function is expected.
        if not (name in self._homes and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *self._homes, *self._rooms})


def lazily(package: str, homes: Mapping[str, str], rooms: Collection[str] = ()) -> None:
    """Give `package` the names in `homes`, each from the module beside it, and its modules `rooms`."""
    module = sys.modules[package]
    vars(module).update(_homes=homes, _rooms=rooms)
    module.__class__ = _Package
