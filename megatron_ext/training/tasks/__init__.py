"""What a run may be trained to do: one task a file."""
