"""Files -> Batch: schema.py says which column is what, parquet.py reads it, batching.py makes the tensors."""
