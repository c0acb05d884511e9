"""The bytes of bundles: here, and in the store that replicas share."""
