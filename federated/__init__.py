"""Federated training from the library's own parts; this version reserves the place and holds no algorithm.

What comes: aggregators that stream (`Aggregator`), a `Server` whose optimizer is any `torch.optim.Optimizer` fed with
the pseudo-gradient, client corrections (SCAFFOLD, SCALLION, SCAFCOM, FedProx), partitioners, and `simulate`. The
uplink and downlink use `gradwire.compression` and `gradwire.comm.feedback` as they are.
"""
