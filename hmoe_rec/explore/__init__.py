"""Means and variances of logits -> what is shown; and what another policy would have earned, from logged choices.

highest_draw.py the probability that each of several normal draws is the highest
policies.py     greedy, epsilon-greedy, UCB, Thompson sampling over the candidates of a request
environment.py  a simulated market of ads: contexts, ads that come and go, a planted click model
simulation.py   policy x environment -> regret, with answers that arrive late and in batches
off_policy.py   logged propensities -> value of another policy: IPS, SNIPS, DR, with confidence intervals
log_file.py     the same for Parquet of any size
"""

from hmoe_rec.kinds import Kinds

POLICIES = Kinds(
    "hmoe_rec.explore.policies:Policy",
    {
        "greedy": "hmoe_rec.explore.policies:Greedy",
        "epsilon_greedy": "hmoe_rec.explore.policies:EpsilonGreedy",
        "ucb": "hmoe_rec.explore.policies:UCB",
        "thompson": "hmoe_rec.explore.policies:Thompson",
    },
)
