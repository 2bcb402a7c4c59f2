"""Training: the epoch loop, a step of each model, losses, optimizer, what is saved and resumed."""
