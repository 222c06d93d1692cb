"""What callers meet: validation, messages, statuses, protocols, tokens, filters."""
