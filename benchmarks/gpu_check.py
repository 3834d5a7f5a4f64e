"""Everything that a GPU must show, in one process and under six minutes on an H100.

    python benchmarks/gpu_check.py FOLDER                         on the GPU, all sections
    python benchmarks/gpu_check.py FOLDER --sections ab           some of them
    python benchmarks/gpu_check.py FOLDER --device cpu --tiny     every line that needs no GPU

    a  bytes, products, gradients, optimizer steps and pieces of a step against the CPU's reference
    b  a tiny model of each family: loss and LoRA gradients against the CPU's
    c  a 135M shape: its loss curve beside the CPU's first steps
    d  speed and peak memory at 1B and 8B against transformers, peft and bitsandbytes
    e  65B in 48 GB, 33B in 24 GB, 7B in 6 GB
    f  paged optimizer state
    g  the prediction of each peak

Into FOLDER it writes ``gpu_check.json``, after each section anew, and ``gpu_check.png``. A section that fails stops no
other; the exit code is 1 if one did. e comes before d, and each section has a time of its own, so that the time of all
is bounded. See docs/gpu.md.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

SECONDS = {"a": 40.0, "b": 50.0, "c": 35.0, "e": 90.0, "d": 90.0, "f": 15.0}
"""What a section may take, in the order in which they run."""
ALL = 340.0


def main(arguments: list[str] | None = None) -> int:
    """Run the sections and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps")
    parser.add_argument("--sections", default="abcdefg")
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - set("abcdefg"):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are a to g")
    warnings.simplefilter("ignore")
    begun = time.monotonic()

    from gpu import agreement, picture, record, sizes

    from halfbyte import devices, kernels
    from halfbyte.errors import InputError
    from halfbyte.quiet import quiet

    try:
        device = devices.choose(given.device)
    except InputError as error:
        parser.error(str(error))
    provider = "bitsandbytes" if device.type == "cpu" and "bitsandbytes" in kernels.providers() else ""
    job = record.Job(device, given.tiny, provider)
    if device.type == "cuda" and "bitsandbytes" not in kernels.providers():
        print("bitsandbytes is not installed: the reference is checked against itself, and slow.", flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    functions = {
        "a": agreement.bytes_and_products, "b": agreement.families, "c": agreement.curve, "d": sizes.speed,
        "e": sizes.headline, "f": agreement.paged,
    }  # fmt: skip
    report: dict[str, Any] = {"circumstances": record.circumstances(job), "sections": {}}
    with quiet():
        for name, seconds in SECONDS.items():
            if name in given.sections:
                left = ALL - (time.monotonic() - begun)
                report["sections"][name] = record.run(name, functions[name], job, min(seconds, left))
                record.write(report, given.folder)
        if "g" in given.sections:
            report["sections"]["g"] = sizes.prediction(report)
    report["seconds"] = round(time.monotonic() - begun, 1)
    record.write(report, given.folder)

    picture.draw(report, given.folder / "gpu_check.png")
    failed = [name for name, section in report["sections"].items() if not section["holds"]]
    print(f"{'Failed: ' + ', '.join(failed) if failed else 'All hold'}, {report['seconds']:.0f} s: {given.folder}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
