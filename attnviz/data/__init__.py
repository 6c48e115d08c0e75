"""Data sets: generated ones, and readers for real ones."""
