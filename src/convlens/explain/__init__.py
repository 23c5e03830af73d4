"""What a net sees: its feature maps, where it looks, how far its units see, what it was reminded of."""
