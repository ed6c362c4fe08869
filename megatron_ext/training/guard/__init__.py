"""What the run does by itself when a step goes wrong: a judge of steps, and its memory."""
