"""Modelling code that travels inside exports; it imports nothing of this framework."""
