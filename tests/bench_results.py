"""Results of a benchmark as `batchnorm bench --json` prints them, made up."""

from batchnorm.bench import summary


def row(shape=(32, 64, 112, 112), ours=0.0123, group="resnet50", **changes):
    """A row in which torch takes 2.5 times as long as ours; options replace its entries."""
    median = {"batchnorm": ours, "torch": 2.5 * ours, "copy": 0.8 * ours}
    median |= changes.pop("others", {})
    seconds = {
        name: {"median": m, "low": 0.9 * m, "high": 1.1 * m, "rounds": 9}
        for name, m in median.items()
    }
    return {
        "group": group,
        "shape": list(shape),
        "layout": "nchw",
        "dtype": "float32",
        "variant": "bn",
        "pass": "forward",
        "least_bytes": 1000,
        "seconds": seconds,
        "speedup": {n: m / ours for n, m in median.items() if n not in ("batchnorm", "copy")},
        "bytes_per_second": 12.3e9,
        "copy_bytes_per_second": 15e9,
        "of_copy_speed": 0.82,
        "to_copy_time": 1.25,
        **changes,
    }


def step(net="lenet", share=0.31):
    """A training step."""
    milliseconds = {"batchnorm": 9.9, "torch": 12.1, "none": 8.8}
    return {
        "net": net,
        "batch": 256,
        "image": [1, 28, 28] if net == "lenet" else [3, 224, 224],
        "seconds": {name: {"median": 1e-3 * value} for name, value in milliseconds.items()},
        "speedup": 1.22,
        "share_of_cost": share,
    }


def memory(variant="bn", ours=512, torch=1024):
    """What is kept for backward by one layer."""
    kind = {"layout": "nchw", "dtype": "float32", "variant": variant}
    kept = {"batchnorm": ours, "torch": torch}
    return {"group": "resnet50", **kind, "tensor_bytes": 4096, "saved_bytes": kept}


def results(rows=(), steps=(), memories=()):
    """All of it."""
    machine = {
        "processor": "Test CPU 9000",
        "cores": 4,
        "threads": 2,
        "wait_policy": None,
        "python": "3.11.7",
        "torch": "2.13.0",
        "numba": "0.68.1",
        "vector_instructions": "AVX512",
        "load": 0.05,
    }
    return {
        "schema": 2,
        "batchnorm": "0.1.0",
        "machine": machine,
        "settings": {"seconds": 0.3, "rounds": 9, "compile": False},
        "rows": list(rows),
        "memory": list(memories),
        "steps": list(steps),
        "geometric_means": summary.geometric_means(rows),
        "slower": summary.slower(rows),
    }
