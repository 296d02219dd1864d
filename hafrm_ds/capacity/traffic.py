"""What processes send each other in an optimizer step, and how long that takes.

An all-gather or a reduce-scatter of S bytes over N processes in a ring makes each of them send (N - 1) / N * S, an
all-reduce twice that (Patarasuk and Yuan 2009; the ZeRO paper, section 7, calls these P, P and 2 P).
"""

from dataclasses import dataclass

from hafrm_ds.capacity.zero import FP32, Parameters, ZeroSettings
from hafrm_ds.hardware.devices import Device


@dataclass(frozen=True)
class Traffic:
    """Bytes of one process in one optimizer step: among all, among those of its machine alone, and to its host."""

    among_all: float
    within_machine: float
    to_host: float

    @property
    def total(self) -> float:
        return self.among_all + self.within_machine + self.to_host

    def seconds(self, device: Device, gpus: int, nodes: int) -> float:
        """Time at the full speed of the links. A ring over several machines leaves each of them once, by the network
        of all its GPUs together."""
        among_all = self.among_all / device.link_bandwidth
        if nodes > 1:
            among_all = max(among_all, self.among_all / (gpus * device.network_bandwidth))
        return among_all + self.within_machine / device.link_bandwidth + self.to_host / device.host_bandwidth


def step_traffic(
    parameters: Parameters, zero: ZeroSettings, num_processes: int, processes_per_machine: int, micro_batches: float
) -> Traffic:
    """Bytes that DeepSpeed 0.19 sends in a step, by its source: in the dtype of the weights, or gradients in fp32."""
    b, n, k = parameters.weight_bytes, num_processes, micro_batches
    trained, everything = b * parameters.trained, b * parameters.all
    gradients = FP32 * parameters.trained if zero.reduces_in_fp32 else trained
    ring, local_ring = (n - 1) / n, (processes_per_machine - 1) / processes_per_machine
    within_machine = to_host = 0.0
    if zero.offloads_optimizer:
        to_host += (FP32 + b) * parameters.trained / n
    if zero.stage < 3:
        # Gradients are all-reduced, in stage 2 after each micro-batch; stages 1 and 2 gather the new weights.
        reduces = k if zero.stage == 2 else 1
        among_all = 2 * reduces * gradients + (trained if zero.stage else 0)
    else:
        # Gathered for forward and for backward, unless so small that they stay; gradients are reduce-scattered.
        again = 1 - min(1.0, zero.max_live / parameters.all)
        among_all = k * (everything + gradients)
        if zero.secondary_shards > 1:
            within_machine = k * again * everything
        else:
            among_all += k * again * everything
        if zero.offloads_parameters:
            to_host += k * (1 + again) * everything / n
    return Traffic(among_all * ring, within_machine * local_ring, to_host)
