"""Training in several processes: the process group, its launcher, BatchNorm across ranks."""
