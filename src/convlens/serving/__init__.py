"""The server: a trained net behind HTTP, and a page of its own."""
