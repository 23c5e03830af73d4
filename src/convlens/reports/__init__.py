"""Reports: plots, image grids and HTML pages of runs, sweeps and explanations."""
