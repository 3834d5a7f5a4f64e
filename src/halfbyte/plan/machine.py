"""What this machine has left for a run: :mod:`halfbyte.memory`, by the name that plans know it by."""

from halfbyte.memory import anonymous_memory, cgroup_memory_limit, free_memory, memory_limit

__all__ = ["anonymous_memory", "cgroup_memory_limit", "free_memory", "memory_limit"]
