"""What should be served: the desired state, and who keeps it."""
