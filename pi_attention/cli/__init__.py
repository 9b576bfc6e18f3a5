"""The command line: one file a command, made from dataclasses by tyro."""
