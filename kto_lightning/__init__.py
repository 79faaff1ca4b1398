"""KTO fine-tuning of language models in PyTorch Lightning."""
