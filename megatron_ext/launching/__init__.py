"""Jobs: what a cluster needs of a job file, the file itself, what speaks against it, and the test of its nodes."""
