"""What happens around the steps of a run: one hook a file."""
