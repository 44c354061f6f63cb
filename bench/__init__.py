"""Side-by-side benchmarks: against the reference implementations and against the floor of the hardware."""
