"""Triton kernels, forward, backward and decoding, and the steps that they share."""
