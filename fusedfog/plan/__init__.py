"""Will it be faster on my network? A simulation of training steps, bucket by bucket, on links of a given latency and rate.

    workload = Workload.even(params=25_600_000, step_s=0.2)
    network = Network(ranks=128, across=Link(latency_s=30e-6, bandwidth=25e9 / 8))
    for method in standard_methods(network):
        print(method.name, predict(workload, network, method).efficiency)

The simulation is `fusedfog.cost`'s; here are `methods`, ways to train by their names, and `report`, tables and curves. Pure
numpy: no process group, no GPU. ``fusedfog plan`` is the command, ``fusedfog calibrate`` measures the links it needs,
``bench/plan.py`` compares it with measurements.
"""

from fusedfog.cost.links import Links
from fusedfog.cost.network import Link, Network, allreduce_seconds
from fusedfog.cost.timeline import Prediction
from fusedfog.cost.workload import Layer, Workload
from fusedfog.plan.methods import Method, finish_times, predict
from fusedfog.plan.report import predict_all, scaling, standard_methods

__all__ = [
    "Layer",
    "Link",
    "Links",
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
