"""Evaluations as jobs, behind every request."""
