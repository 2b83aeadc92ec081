"""Where samples come from: small images, ImageNet, and their batches on the device."""
