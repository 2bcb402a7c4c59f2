"""Reading weights and checkpoints: ours, SAM's, SAM-Med3D's, published U-SAM's, LoRA files."""
