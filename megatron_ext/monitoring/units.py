"""Figures for people: a rate of computation in the unit in which it has digits before the point."""


def compute_rate(tflops: float) -> str:
    """`tflops` as TFLOP/s or, where that is below 1, as GFLOP/s; in three digits."""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:.3g} GFLOP/s"
