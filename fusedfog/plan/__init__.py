"""Will it be faster on my network? A simulation of training steps, bucket by bucket, on links of a given latency and rate.

    workload = Workload.even(params=25_600_000, step_s=0.2)
    network = Network(ranks=128, across=Link(latency_s=30e-6, bandwidth=25e9 / 8))
    for method in standard_methods(network):
        print(method.name, predict(workload, network, method).efficiency)

`network` holds what a message and an all-reduce cost, `workload` what a step computes and how it is cut into buckets,
`timeline` who waits for whom, `report` tables and curves. Pure numpy: no process group, no GPU. ``fusedfog plan`` is the
command, ``fusedfog calibrate`` measures the links it needs, ``bench/plan.py`` compares it with measurements.
"""

from fusedfog.plan.network import Link, Network, allreduce_seconds
from fusedfog.plan.report import predict_all, scaling, standard_methods
from fusedfog.plan.timeline import Method, Prediction, finish_times, predict
from fusedfog.plan.workload import Layer, Workload

__all__ = [
    "Layer",
    "Link",
    "Method",
    "Network",
    "Prediction",
    "Workload",
    "allreduce_seconds",
    "finish_times",
    "predict",
    "predict_all",
    "scaling",
    "standard_methods",
]
