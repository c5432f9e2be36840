"""Recovery of Alpaca-7B from LLaMA-7B and the published weight difference."""
