"""Draws as on the host, but tells what it has drawn a step late, as a GPU does."""

from mii_hpc.engine.sampling.host import HostSampling


class LateSampling:
    """See SamplingBackend."""

    lag = 1

    def __init__(self, drawn, *_):
        self._drawn = drawn
        self._host = HostSampling(drawn)

    def draw(self, logits, step, samplers):
        draw = self._host.draw(logits, step, samplers)
        for part, choice in zip(step.slices, draw.wait(), strict=True):
            if part.sample:
                self._drawn[part.slot] = choice.token_id or 0
        return draw
