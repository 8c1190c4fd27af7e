"""The training step, the loops around it, and what keeps a run safe."""
