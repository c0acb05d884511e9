"""Offline: data, training, evaluation, and the export of what was learnt to a bundle."""
