"""Fused Triton kernels, forward and backward. Loaded only when used."""
