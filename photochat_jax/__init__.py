"""Photo-sharing dialogue agents, trained end to end, in JAX and Flax."""

__version__ = '0.1.0'
