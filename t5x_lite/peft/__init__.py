"""Fine-tuning as transforms of the parameter tree."""
