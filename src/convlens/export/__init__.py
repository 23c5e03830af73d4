"""Turn a trained model into a file for others: ONNX, int8, HTML."""
