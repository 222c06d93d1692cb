"""Every figure that the README claims, one command each."""
