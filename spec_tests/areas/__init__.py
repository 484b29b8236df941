"""The requirements, a module for each area."""
