"""The guard inside other frameworks. Each module needs its framework; no other part of this package needs it."""
