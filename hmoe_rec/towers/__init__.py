"""5. Expert outputs -> logits: the route table (`routing`), the gates (`gate`) and the towers (`tower`)."""
