"""2. Raw values -> one vector per field and embedding set.

One room entered twice: numbers and pre-trained vectors are encoded before the lookup, behavior sequences are pooled
after it. `fields.FieldEncoder` puts a set's fields side by side for the experts.
"""

POOLINGS = {
    "mean": "hmoe_rec.encoding.pooling:MeanPooling",
    "target_attention": "hmoe_rec.encoding.pooling:TargetAttention",
}
