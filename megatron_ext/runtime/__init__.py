"""Processes and devices: where a run computes, how its processes find each other, and what they log."""
