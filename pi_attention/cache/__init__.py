"""Decoding caches of a layer, in torch alone: one contract, and the two storages that keep it."""

from pi_attention.cache.contract import KeyValueCache
from pi_attention.cache.fixed import StaticLayerCache
from pi_attention.cache.growing import LayerCache

__all__ = ["KeyValueCache", "LayerCache", "StaticLayerCache"]
