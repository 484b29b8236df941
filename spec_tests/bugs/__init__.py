"""Seeded bugs: the proof that the requirements are strict."""
