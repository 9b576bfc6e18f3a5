"""Evaluation: language modelling and generation."""
