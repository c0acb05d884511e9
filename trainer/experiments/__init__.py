"""Experiments that decided a default, kept so that they can be run again."""
