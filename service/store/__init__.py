"""What the service keeps: latents, encodings, jobs."""
