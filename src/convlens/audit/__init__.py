"""The data doctor: duplicates, leaks and label issues of a data set."""
