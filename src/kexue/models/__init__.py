"""Encoders and the parts they are built from."""

from kexue.models.bag_encoder import BagEncoder

__all__ = ["BagEncoder"]
