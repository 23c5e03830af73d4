"""How good a net is, and how sure one can be of it."""
