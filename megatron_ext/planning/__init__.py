"""What a run will cost, by formula: parameters, FLOPs and state memory."""
