"""HTML, CSS and JavaScript of all pages, and the function that fills them in."""
