"""Videos in, batches out: packing to WebDataset shards and reading them in an exact order. Knows no model."""
