"""Experiments that decided how the server works; run as modules, not part of it."""
