"""A model written for one device -> the same model on many: who holds which rows (plans), and the sharded module."""
