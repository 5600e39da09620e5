"""6. Logits, labels, weights -> one loss per task: ([B, T], [B, T], [B]) -> [T].

A new kind is one class with the promises of `hmoe_rec.losses.base.Loss`, and one line here.
"""

from hmoe_rec.kinds import Kinds

USER = "user"  # the group of the schema's user_key, for losses that compare examples within groups

LOSSES = Kinds(
    "hmoe_rec.losses.base:Loss",
    {
        "bce": "hmoe_rec.losses.pointwise:BCELoss",
        "focal": "hmoe_rec.losses.pointwise:FocalLoss",
        "pair": "hmoe_rec.losses.ranking:PairLoss",
        "list": "hmoe_rec.losses.ranking:ListLoss",
        "rcr": "hmoe_rec.losses.ranking:RCRLoss",
        "jrc": "hmoe_rec.losses.ranking:JRCLoss",
    },
)

WEIGHTINGS = Kinds(
    "hmoe_rec.losses.weighting:TaskWeighting",
    {
        "fixed": "hmoe_rec.losses.weighting:FixedWeighting",
        "uncertainty": "hmoe_rec.losses.weighting:UncertaintyWeighting",
        "dwa": "hmoe_rec.losses.weighting:DWAWeighting",
    },
)
