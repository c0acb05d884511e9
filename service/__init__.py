"""Online: HTTP, batching, the engine, the registry, metrics, and the commands of a server."""
