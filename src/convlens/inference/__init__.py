"""Use a trained model: bundles, classifiers in PyTorch and in ONNX Runtime."""
