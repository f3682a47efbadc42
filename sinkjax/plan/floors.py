"""How long a step takes at least, by arithmetic, by memory and by the links between chips."""

import dataclasses

from sinkjax.chips import Chip
from sinkjax.plan.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Floors:
    """Seconds of one step if nothing but one thing took time.

    Args:
      arithmetic: all operations of the program at the chip's peak.
      memory: all bytes that the program moves through HBM at its bandwidth.
      interconnect: all bytes that a chip sends, over all its links at once.
      exposed: of these, what no matrix product runs beside.
    """

    arithmetic: float
    memory: float
    interconnect: float
    exposed: float

    @property
    def step(self) -> float:
        """An estimate of the step: what hides well takes no time, what is exposed comes on top.

        It is optimistic: no kernel reaches the peak, and a group along one dimension of a torus has
        the links of that one alone.
        """
        return max(self.arithmetic, self.memory, self.interconnect - self.exposed) + self.exposed


def floors(flops: float, traffic: float, exchanged: list[Collective], device: Chip) -> Floors:
    r"""Floors of one device, of which a chip may have several.

    $$ \frac{\text{FLOP}}{\text{peak}}, \quad \frac{\text{bytes}}{\text{HBM bandwidth}}, \quad
       \frac{\text{bytes sent}}{\text{ICI bandwidth}} $$

    Args:
      flops: operations of one device in a step.
      traffic: bytes that it reads and writes in its HBM.
      exchanged: what it sends.
      device: the chip; devices on one share its memory and its links.
    """
    share = device.ici_bandwidth / device.devices_per_chip
    sent = sum(one.times * one.nbytes for one in exchanged)
    exposed = sum(one.times * one.nbytes for one in exchanged if not one.overlapped)
    return Floors(
        flops / device.device_peak_flops,
        traffic / device.device_hbm_bandwidth,
        sent / share,
        exposed / share,
    )
