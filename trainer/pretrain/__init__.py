"""The recipe of the embedded base: from pinned packages to ``medley-mini.safetensors``."""
