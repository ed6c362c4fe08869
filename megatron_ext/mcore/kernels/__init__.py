"""Our own Triton kernels, one file each: formula, bytes moved, source. Imported only where `runtime.kernels` is triton.

Each does in one pass over memory what the torch steps beside it do in several. Figures are bytes an element in bf16.
"""
