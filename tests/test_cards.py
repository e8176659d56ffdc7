"""The registry finds what is registered, and says what is near when it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import attnlab
from attnlab.cards import CAUSAL_SELF, TOKENS, Card, Size, entries, register


def test_names_can_be_filtered() -> None:
    assert "multihead" in attnlab.names(kind="tokens", family="softmax", capability=CAUSAL_SELF)
    assert "multihead" not in attnlab.names(kind="features")
    assert attnlab.names() == sorted(attnlab.names())


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'multihead'"):
        attnlab.build("multhead", 32)
    with pytest.raises(ValueError, match="tokens"):
        attnlab.names(kind="tokns")


def test_a_named_size_builds_with_its_arguments_and_they_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlab.cards._entries", {})
    monkeypatch.setattr("attnlab.cards._loaded", True)

    @register(Card("net", "0000.00000", "test", TOKENS, sizes={"net_tiny": Size(1, dict(width=2, depth=3))}))
    def net(width: int, depth: int = 1) -> tuple[int, int]:
        return width, depth

    assert attnlab.build("net_tiny") == (2, 3)
    assert attnlab.build("net_tiny", depth=5) == (2, 5)
    assert attnlab.build("net", 7) == (7, 1)
    assert attnlab.describe("net_tiny").name == "net"
    assert [e.card.name for e in entries()] == ["net"]


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlab.cards._entries", {})

    class First: ...

    class Second: ...

    register(Card("same", "0000.00000", "test", TOKENS))(First)
    with pytest.raises(ValueError, match=r"already registered by .*First"):
        register(Card("same", "0000.00000", "test", TOKENS))(Second)


def test_importing_attnlab_imports_none_of_its_parts() -> None:
    program = "import sys, attnlab; print([m for m in sys.modules if m.startswith('attnlab.')], 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["['attnlab.lazy']", "False"]


def test_a_function_wins_over_the_module_of_its_name() -> None:
    import attnlab.attend
    import attnlab.scan.chunked

    assert callable(attnlab.attend)
    assert callable(attnlab.scan)


def test_the_public_face_is_complete() -> None:
    assert all(getattr(attnlab, name) is not None for name in dir(attnlab))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = attnlab.nonsense
