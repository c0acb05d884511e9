"""Online: HTTP, batching, the engine, the registry, metrics and the commands that talk to a server."""
