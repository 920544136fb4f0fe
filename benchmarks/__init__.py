"""Measure, never assert: each module writes dated JSON to ``results/``."""
