"""Weights of trained models: reading, converting, naming."""
