"""Arms side by side: what is trained, in which order, and what came out."""
