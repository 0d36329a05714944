"""Architectures built from the parts, their configs, weights and folders."""
