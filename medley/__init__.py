"""The shared vocabulary of Medley: backbone, experts and router, the selector, the routed model, the bundle, errors.

Import from the modules (``from medley.bundle import read_bundle``); the module's name is the documentation.
"""
