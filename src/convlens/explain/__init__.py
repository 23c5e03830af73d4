"""Explanations: class activation maps, occlusion maps, feature maps, receptive fields, similar training images."""
