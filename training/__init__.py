"""Train the embedded ensemble. The service does not need this package."""
