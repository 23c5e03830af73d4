"""Data of every source in one form: uint8 images N x C x H x W and int64 labels."""
