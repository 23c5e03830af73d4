"""Files, devices, memory, random numbers and progress bars."""
