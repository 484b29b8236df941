"""Adapter classes of real implementations."""
