"""Numerical building blocks; they import nothing else of the package."""
