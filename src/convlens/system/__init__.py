"""What the operating system and the hardware offer: files, devices, memory, random numbers, progress."""
