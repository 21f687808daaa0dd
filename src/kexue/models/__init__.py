"""Encoders and the parts they are built from; loaded when they are first used, as they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.models.bag_encoder import BagEncoder

__all__ = ["BagEncoder"]


def __getattr__(name: str) -> Any:
    if name == "BagEncoder":
        from kexue.models.bag_encoder import BagEncoder

        return BagEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
