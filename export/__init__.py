"""attn_deploy.export: from a PyTorch model to ONNX. Needs torch, onnx, onnx_ir and onnxscript."""
