"""Routes, one file per concern; each is thin and calls the runtime."""
