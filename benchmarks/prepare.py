"""What `make gpu` need not make on the GPU machine: ``python -m benchmarks.prepare``, on one without a GPU.

It compiles the kernels of ResNet-50 in half precision into build/triton-cache, which ``make gpu`` uses if it is there.
Triton's cache knows a kernel by its source, options, capability and Triton's own files: the Python and the Triton must
be those of the GPU machine. The native module is made by ``make native``, by that Python too.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig

from benchmarks.gpu import CACHE, ROOT

PRECISIONS = ("fp16", "bf16")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", default="h200", help="built-in GPU whose kernels are compiled (default: h200)")
    parser.add_argument("--batch", default="128,1,32,256,8", help="images in a batch, comma-separated")
    parser.add_argument("--dtype", default=",".join(PRECISIONS), help="precisions, comma-separated")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: one for each core)")
    given = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)

    import triton

    from resnet_fast.kernels import gpus
    from resnet_fast.tuning import compiler, estimate

    try:
        gpu = gpus.known(given.gpu)
        tasks = {
            key: task
            for precision in given.dtype.split(",")
            for batch in map(int, given.batch.split(","))
            for schedule in (estimate.PER_CONV, estimate.PLANNED)
            for key, task in estimate.tasks(
                estimate.launched(schedule, "resnet50", batch, 224, precision, gpu), gpu
            ).items()
        }
    except (ValueError, KeyError) as error:
        parser.error(str(error))
    CACHE.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with compiler.Compiler(given.jobs) as pool:
        for compiled in pool.run(tasks.values()):
            if compiled.resources is None:
                print(f"{compiled.task.case}: {compiled.error}", file=sys.stderr)
                wrong += 1
    size = sum(path.stat().st_size for path in CACHE.rglob("*") if path.is_file())
    print(
        f"{len(tasks) - wrong} kernels for {gpu.name} by Triton {triton.__version__} in {CACHE}: {size / 2**20:.1f} MiB"
    )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = ROOT / "resnet_fast" / f"_C{suffix}"
    print(
        f"native module: {module.name if module.is_file() else f'none of this Python ({suffix}); make native makes it'}"
    )
    print("carry both with the checkout: build/triton-cache and resnet_fast/_C.*.so with _build_record.json")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
