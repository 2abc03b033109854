"""What the training scripts are made of. Imports point down: see docs/architecture.md."""
