"""gradwire: training across slow or uneven links, as good as inside one machine.

`gradwire.compression` holds stateless gradient compressors, `gradwire.comm` the error feedback, exchanges and
communicators that run them on `torch.distributed`, `gradwire.optim` drop-in optimizers, `gradwire.federated`
aggregators and the simulation harness, and `gradwire.bench` the `gradwire` command.
"""

__version__ = "0.1.0"
