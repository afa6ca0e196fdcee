"""What a training step costs on links, as numbers: below the optimizers, whose `topology="auto"` chooses by it.

`network` holds what a message and an all-reduce cost, `links` the file of measured ones, `workload` what a step computes and how
it is cut into buckets, `timeline` who waits for whom, `loss` what was measured of losses, and `prices` all three together. Pure
numpy: no process group, no GPU. `plan` puts names and tables on it.
"""
