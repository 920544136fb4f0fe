"""Honest numbers: tasks, conditions, metrics and the report."""
