"""Measuring what a model draws, and comparing this implementation with the reference."""
