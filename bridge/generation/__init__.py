"""Receivers answer: requests join a running batch, or run in left-padded ones."""
