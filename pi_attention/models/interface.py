"""The older place of `pi_attention.convert.register`."""

from pi_attention.convert.interface import register

__all__ = ["register"]
