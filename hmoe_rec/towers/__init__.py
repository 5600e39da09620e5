"""5. Expert outputs -> logits: the route table (`routing`), the gates (`gate`) and the towers, one file per kind.

What goes in: one vector per task and example, list [T] of [B, H]. What comes out: logits [B, T] of `forward`, and for
estimates of uncertainty `features`, what the last layer sees (the kinds mlp and sngp), or `heads`, the logits of every
head apart (the kind bootstrap). `shift` moves the constant of each task's logit, to begin a run at the right rate.
"""

from hmoe_rec.kinds import Kinds

TOWERS = Kinds(
    "hmoe_rec.towers.base:TaskTowers",
    {
        "mlp": "hmoe_rec.towers.tower:Towers",
        "sngp": "hmoe_rec.towers.sngp:SNGPTowers",
        "bootstrap": "hmoe_rec.towers.bootstrap:BootstrapTowers",
    },
)
