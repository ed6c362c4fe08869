"""From text to training samples: corpora, tokenizers, prepared token files, blends and batches."""
