"""Kind ``reuse``: the pruned layers' own weights, as :class:`KVProjections` start out. Nothing is fitted."""

from pop_lightning.fitting.kinds import Kind

KIND = Kind("reuse")
