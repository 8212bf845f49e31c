"""Kind ``reuse``: the pruned layers' own weights, the initial state of :class:`KVProjections`. Nothing is fitted."""

from pop_lightning.fitting.kinds import Kind

KIND = Kind("reuse")
