"""Inference: model bundles, and classifiers that run them with PyTorch or ONNX Runtime."""
