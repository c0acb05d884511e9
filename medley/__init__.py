"""The shared vocabulary: backbone, experts and router, selector, routed model, bundle, errors.

Import from the modules (``from medley.bundle import read_bundle``); the module's name is the
documentation.
"""
