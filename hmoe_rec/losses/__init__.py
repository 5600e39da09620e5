"""6. Logits, labels, weights -> one loss per task: ([B, T], [B, T], [B]) -> [T]."""
