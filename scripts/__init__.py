"""Release tools: reproduce the results, update their tables, release the weights."""
