"""Training a ResNet on the fused blocks: `data`, `loop`, `checkpoint`."""
