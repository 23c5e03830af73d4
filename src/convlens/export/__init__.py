"""Export trained models: ONNX, int8, and an HTML page that runs the model."""
