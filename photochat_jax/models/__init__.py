"""The networks, one file per network, and their composition."""
