"""From text in files to token files: corpora, filters, encoding in parallel, random order, what was prepared."""
