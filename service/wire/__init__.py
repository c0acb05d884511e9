"""What goes over the wire: schemas, tags, the OpenAPI document. No behaviour beyond checking."""
