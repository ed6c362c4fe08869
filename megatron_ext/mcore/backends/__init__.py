"""Where layers come from: one BackendSpecProvider for each library of kernels."""
