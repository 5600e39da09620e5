"""How sure a model is of a logit: (mean, variance) of every example and task, and how good that variance is.

moments.py    mean and variance of a logit, the probability that follows from them
posterior.py  Gaussian posterior of a last layer: its precision matrix, added up over examples and processes
rows.py       Gaussian posterior of embedding rows: what is not known of an id that was seldom or never seen
estimates.py  a trained model -> `Batch` in, `Moments` out: last layer, bootstrap heads, dropout, ensemble
bootstrap.py  example weights of bootstrap heads, by the id of the row
logistic.py   Bayesian logistic regression that learns batch by batch, for simulations
quality.py    log loss, coverage of intervals, recognition of what is new
"""

KINDS = ("laplace", "row_laplace", "sngp", "bootstrap", "mc_dropout", "ensemble")
