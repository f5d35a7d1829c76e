"""ZeRO by DeepSpeed: what of the package is used, its settings, engines, gradients and tensors."""
