"""`job_of`: what a client's part of a round amounts to, for models of time."""

from gradwire.federated.client_runner import SCALAR_BYTES, ClientRunner
from gradwire.federated.client_times import Job
from gradwire.federated.link import Link


def examples_in(steps: int, num_examples: int, batch_size: int | None) -> int:
    """Examples in so many batches of a client, each as often as it comes; the last batch of an epoch may be smaller.

    Example:
        >>> examples_in(steps=5, num_examples=10, batch_size=4)  # 4, 4, 2, 4, 4
        18
    """
    if not num_examples:
        return 0
    size = min(batch_size or num_examples, num_examples)
    epochs, rest = divmod(steps, -(-num_examples // size))
    return epochs * num_examples + rest * size


def vector_bytes(runner: ClientRunner, link: Link | None) -> int:
    """Bytes of a vector of all trainable parameters, as one message of a link or, without one, dense."""
    vector = runner.model.vector
    if link is None:
        return vector.numel() * vector.element_size()
    return link.compressor.payload_bytes(vector.shape, vector.dtype)


def bytes_up(runner: ClientRunner) -> int:
    """Bytes of a client's messages."""
    algorithm, one = runner.algorithm, vector_bytes(runner, runner.uplink)
    buffers = 0 if runner.buffers is None or not runner.buffers.sends else runner.buffers.nbytes
    return one * len(algorithm.messages) + SCALAR_BYTES * len(algorithm.scalars) + buffers


def job_of(runner: ClientRunner, client: int, *, round: int, number: int, start: int, bytes_down: int) -> Job:
    """The job of a client that gets the model of a round at a tick.

    Args:
        runner: Knows the client's examples, local training and messages.
        client: Its number.
        round: Whose local training it does.
        number: Of the job, for random times.
        start: Tick.
        bytes_down: Of what it receives.
    """
    count = runner.clients.num_examples[client]
    examples = examples_in(runner.load(client, round), count, runner.trainer.training.batch_size)
    return Job(client, number, start, examples, bytes_down=bytes_down, bytes_up=bytes_up(runner))
