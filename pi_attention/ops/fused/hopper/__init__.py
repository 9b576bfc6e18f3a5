"""Kernels for Hopper (H100, H200), in Gluon: of the local band, and of skip bands that are windows over a residue.

They are warp-specialised and persistent. A program has three warpgroups: two consumers, which each own 64 rows of the
tile, and a producer, which keeps a ring of tiles filled by the tensor memory accelerator (TMA). Programs stay on
their multiprocessor and walk from tile to tile, so that loads of the next tile run under the products of this one.
Other shapes and GPUs take the Triton kernels.
"""
