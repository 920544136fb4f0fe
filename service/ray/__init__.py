"""The service on Ray Serve: encoders and generators as deployments that scale separately."""
