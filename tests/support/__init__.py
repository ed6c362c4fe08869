"""What test modules share: commands, small runs and their files."""
