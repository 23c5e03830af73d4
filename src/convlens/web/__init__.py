"""HTML, CSS and JavaScript of every page, and their renderer."""
