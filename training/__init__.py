"""How the embedded ensemble was made; not needed to run the service."""
