"""Benchmarks: the kernels against bitsandbytes, dense torch and the machine's own ceilings; training against peers.

The latter is in :mod:`halfbyte.bench.train`, which imports more.
"""

from halfbyte.bench.report import Report
from halfbyte.bench.run import bench_kernels, default_folder
from halfbyte.bench.works import Work, kernel_works

__all__ = ["Report", "Work", "bench_kernels", "default_folder", "kernel_works"]
