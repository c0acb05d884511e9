"""What this server has: the life of a version, and where it is."""
