"""Several GPUs of one host: the operator, training steps, contexts that fit, and whole runs. See `__main__`."""
