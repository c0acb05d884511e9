"""What is served: the registry, the bytes, the life of a version, and where it is."""
