"""The implementation by fused Triton kernels. Kernels load when they are run."""
