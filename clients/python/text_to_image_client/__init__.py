"""Client of the text-to-image gRPC service."""
