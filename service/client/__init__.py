"""Call a LatentWire service from Python. Needs httpx and numpy alone."""
