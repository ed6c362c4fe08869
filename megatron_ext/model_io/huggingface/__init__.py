"""What only Hugging Face directories have: modelling code, model card, companion files, hub."""
