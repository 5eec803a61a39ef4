"""What leaves a run of maps: a folder that plain transformers and torch run, an ONNX file."""
