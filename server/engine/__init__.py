"""Decide whose model call is next and run it: admission, scheduling, threads, events. Nothing here imports torch."""
