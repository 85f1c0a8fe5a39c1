"""Weights from and for the Hugging Face Hub."""
