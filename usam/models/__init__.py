"""The networks and what their forward pass needs: prompts, LoRA, averaging of several models."""
