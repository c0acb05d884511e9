"""Checkpoints that others have published, made into bundles."""
