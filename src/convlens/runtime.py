"""What a run computes on, and with: device, threads, and seeds that are functions of (seed, epoch, step)."""
