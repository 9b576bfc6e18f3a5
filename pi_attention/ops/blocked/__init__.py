"""The implementation in plain PyTorch: the rows of a band, one band, its registered operator, both bands."""
