"""A service in two processes: one answers HTTP, the other holds the models."""
