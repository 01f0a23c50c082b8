"""Measurements, one folder a topic; each prints what it found."""
