"""Carry a sender model's reading of a text into a receiver model as soft tokens."""
