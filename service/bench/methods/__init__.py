"""Tasks of every method on a server: size, loading, and what aggregated answers cost."""
