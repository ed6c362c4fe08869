"""What training reads: a stream of global batches over blended sources, and exact positions in it."""
