"""Where the reports of a run go: one sink a file, each of which may be off without cost."""
