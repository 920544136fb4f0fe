"""Call a LatentWire service from Python. Needs httpx, httpx-sse, numpy and pydantic: no torch, no models."""
