"""Serve bridges over HTTP and from the command line."""
