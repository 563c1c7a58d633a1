"""What finds the parameters of a law: Newton's method in batches, SciPy for the rest, bounds and starts."""
