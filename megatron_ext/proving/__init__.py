"""Proof that a parallel layout trains what one process trains: for our tests and for users (tools/prove.py)."""
