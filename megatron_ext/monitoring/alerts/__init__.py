"""Tells people what happens to a run: rate-limited messages, sent by threads that training never waits for."""
