"""viz.tsne against openTSNE, scikit-learn, Intel's extension of it and FIt-SNE: CPU seconds, KL.

    pip install openTSNE==1.0.4 scikit-learn scikit-learn-intelex fitsne
    python benchmarks/tsne.py [--sizes 2000,10000,50000] [--data clusters,tokens,MODEL,FILE]

Peers that are not installed are left out. fitsne is built on the spot, and needs Cython, wheel and
the headers of FFTW. 128,000 points are asked for by --sizes 128000.

Every fit is a process of its own with one thread; rounds take turns, and a ratio is the median over
rounds. Processor seconds, imports left out, are what a busy machine disturbs least. Every method
gets the same rows, and whatever it does to them first is part of it. Perplexity 30, each method's
own defaults otherwise, Intel's those of scikit-learn.

Maps are judged by the given rows in all dimensions. The divergence is the same for all, in float64:
affinities by bisection from exact neighbours, Z over all pairs. Kept is the share of a row's 10
nearest rows that are among its 10 nearest on the map, by scikit-learn's exact search, the mean over
2,000 rows. Where viz.tsne does not compare all pairs, the share of the 90 nearest rows that it
finds is printed, a mean over about 1000 rows. A peer that would take too long at a size is left out
unless --all: scikit-learn and openTSNE with exact neighbours beyond 10,000 points, all beyond
50,000, where maps are not judged.

clusters: 20 Gaussian clusters of random shapes, axes shrinking as exp(-i / 10), in 50 dimensions.
tokens: as a table of token embeddings: 192 dimensions whose spread falls slowly, as i^-1/4, rows
in groups of about 20 that hardly stand out, norms log-normal.
MODEL: a model's folder; the rows are a sample of its input embeddings.
FILE: of activations, as `collect` writes it: a sample of its rows at the deepest layer in it.
--components 50 first reduces wider rows to their principal components, for all methods.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import viz

PERPLEXITY = 30
METHODS = {"ours": 10**9, "openTSNE": 50_000, "openTSNE, exact": 10_000, "scikit-learn": 10_000,
           "intelex": 50_000, "FIt-SNE": 50_000}  # and the most points
PACKAGES = {"openTSNE": "openTSNE", "openTSNE, exact": "openTSNE", "scikit-learn": "scikit-learn",
            "intelex": "scikit-learn-intelex", "FIt-SNE": "fitsne"}


def clusters(N: int, seed: int = 0) -> np.ndarray:
    r, D = np.random.default_rng(seed), 50
    centre, group, x = 3 * r.normal(size=(20, D)), r.integers(20, size=N), np.empty((N, D))
    for g in range(20):
        shape = r.normal(size=(D, D)) * np.exp(-np.arange(D) / 10)
        x[group == g] = centre[g] + r.normal(size=((group == g).sum(), D)) @ shape.T
    return x.astype(np.float32)


def tokens(N: int, seed: int = 0) -> np.ndarray:
    r, spread = np.random.default_rng(seed), np.arange(1, 193) ** -0.25
    groups = 0.6 * spread * r.normal(size=(N // 20, 192))
    x = groups[r.integers(len(groups), size=N)] + spread * r.normal(size=(N, 192))
    return (x * 0.02 * np.exp(0.15 * r.normal(size=(N, 1)))).astype(np.float32)


DATA = {"clusters": clusters, "tokens": tokens}


def real(source: str, N: int) -> np.ndarray:
    """A sample of N rows, or all, of a model's input embeddings or of collected activations."""
    from safetensors import safe_open

    rows = None
    if Path(source).is_file():
        from lab.activations import Collection

        collection = Collection(Path(source))
        rows = collection.rows(max(collection.layers))
    name = "model.embed_tokens.weight"
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():
                rows = file.get_tensor(name)
    if rows is None:
        sys.exit(f"--data {source}: neither {' nor '.join(DATA)}, nor a file, nor a folder with "
                 f"{name}: give one")
    return np.random.default_rng(0).permutation(rows.float().numpy())[:N]


def fit(method: str, x: np.ndarray) -> np.ndarray:
    if method == "ours":
        viz.THREADS = 1
        return viz.tsne(x, PERPLEXITY).points
    if method == "FIt-SNE":
        from fitsne import FItSNE

        return FItSNE(x.astype(np.float64), perplexity=PERPLEXITY, rand_seed=1, nthreads=1)
    if method in ("scikit-learn", "intelex"):
        if method == "intelex":
            from sklearnex import patch_sklearn

            patch_sklearn(verbose=False)
        from sklearn.manifold import TSNE

        return TSNE(perplexity=PERPLEXITY, random_state=0, n_jobs=1).fit_transform(x)
    from openTSNE import TSNE

    neighbours = {"neighbors": "exact"} if method.endswith("exact") else {}
    return np.asarray(TSNE(perplexity=PERPLEXITY, random_state=0, n_jobs=1, **neighbours).fit(x))


def child(method: str, source: str, target: str) -> None:
    """One fit: the map to target, seconds and peak memory to standard output."""
    x = np.load(source)
    fit(method, x[:200])  # imports, and what is compiled at first use
    before, wall, cpu = _peak(), time.perf_counter(), time.process_time()
    points = fit(method, x)
    print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall,
                      "memory": _peak() - before}))
    np.save(target, points)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def affinities(x: np.ndarray):
    """Rows, columns and values of symmetric P, by bisection in float64."""
    from scipy.sparse import coo_array

    N, k = len(x), 3 * PERPLEXITY
    index, d = viz._neighbours(x, x, k, itself=True)  # all pairs, tested against scipy's KDTree
    d -= d.min(1, keepdims=True)
    low, high = np.full((N, 1), -60.0), np.full((N, 1), 60.0)
    for _ in range(60):
        middle = (low + high) / 2
        p = np.exp(-np.exp(middle) * d)
        p /= p.sum(1, keepdims=True)
        wide = -(p * np.log(np.maximum(p, 1e-300))).sum(1, keepdims=True) > math.log(PERPLEXITY)
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    p = coo_array((p.ravel(), (np.repeat(np.arange(N), k), index.ravel())), shape=(N, N)).tocsr()
    p = ((p + p.T) / (2 * N)).tocoo()
    return *p.coords, p.data


def divergence(i, j, p, y) -> float:
    y = y.astype(np.float64)
    _, Z, _ = viz._all_pairs(y)
    return float((p * np.log(p * (1 + np.square(y[i] - y[j]).sum(1)))).sum() + math.log(Z))


def kept(x, y, k=10, rows=2000) -> float:
    """The share of the k nearest rows of x (N, D) that are also among the k nearest of y (N, 2)."""
    from sklearn.neighbors import NearestNeighbors

    asked = np.linspace(0, len(x) - 1, min(rows, len(x))).astype(int)
    near = []
    for points in (x, y):
        search = NearestNeighbors(n_neighbors=k + 1).fit(points.astype(np.float64))
        near.append(search.kneighbors(points[asked], return_distance=False))
    return float(np.mean([len(set(a) & set(b) - {i}) / k for i, a, b in zip(asked, *near)]))


def found(x) -> float:
    """The share of the neighbours of about 1000 rows that viz.tsne finds."""
    k = 3 * PERPLEXITY
    parts = viz._near_cells(x, k, viz.RECALL)
    if parts is None:
        return 1.0
    parts = parts[::max(1, len(x) // 1000)] if len(parts) > 50 else parts
    asked = np.concatenate([rows for rows, _ in parts])
    near, _ = viz._neighbours(x, x, k, itself=True, parts=parts)
    true, _ = viz._neighbours(x[asked], x, k + 1)
    return float(np.mean([len(set(a) & set(b) - {i}) / k
                          for i, a, b in zip(asked, near[asked], true)]))


def measure(kind: str, N: int, methods: list[str], rounds: int, judged: bool,
            components: int | None) -> None:
    results = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/x.npy", f"{folder}/y.npy"
        x = DATA[kind](N) if kind in DATA else real(kind, N)
        if components and x.shape[1] > components:
            x = viz.project(viz.pca(x, components), x).astype(np.float32)
        np.save(source, x)
        reference = affinities(x) if judged else None
        for turn in range(rounds):
            for method in methods:
                out = subprocess.run([sys.executable, __file__, "--child", method, source, target],
                                     stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(out.stdout.splitlines()[-1])
                if turn == 0 and judged:
                    y = np.load(target)
                    result |= {"kl": divergence(*reference, y), "kept": kept(x, y)}
                results[method].append(result)
    print(f"\n{kind}, {len(x)} points x {x.shape[1]}, {rounds} rounds\n{'':<18}{'CPU s':>8}"
          f"{'wall s':>8}{'KL':>9}{'KL / ours':>11}{'kept':>7}{'MB':>7}"
          f"{'CPU / ours: median (least - most)':>36}")
    if N > viz.APPROXIMATE:
        print(f"neighbours found by ours: {found(x):.3f}")
    ours = results["ours"]
    for method, runs in results.items():
        cpu, wall, memory = (statistics.median(r[key] for r in runs)
                             for key in ("cpu", "wall", "memory"))
        kl, ratios = runs[0].get("kl", math.nan), [r["cpu"] / o["cpu"] for r, o in zip(runs, ours)]
        print(f"{method:<18}{cpu:>8.2f}{wall:>8.2f}{kl:>9.4f}"
              f"{kl / ours[0].get('kl', math.nan):>11.4f}"
              f"{runs[0].get('kept', math.nan):>7.3f}{memory / 1e6:>7.0f}"
              f"{statistics.median(ratios):>16.1f} ({min(ratios):.1f} - {max(ratios):.1f})",
              flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", default="2000,10000,50000", help="numbers of points")
    p.add_argument("--data", default=",".join(DATA),
                   help=f"of {', '.join(DATA)}, models' folders, files of collect")
    p.add_argument("--components", type=int, help="of wider rows, for all methods")
    p.add_argument("--methods", help="instead of those that a size allows, separated by ;")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--all", action="store_true", help="every method at every size")
    a = p.parse_args()
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = "1"
    print("one thread; numpy", np.__version__)
    missing = []
    for package in dict.fromkeys(PACKAGES.values()):
        try:
            print(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
            print(f"{package} is not installed, and left out: pip install {package}")
    for N in map(int, a.sizes.split(",")):
        chosen = a.methods.split(";") if a.methods else [
            m for m, largest in METHODS.items() if a.all or N <= largest]
        chosen = [m for m in chosen if PACKAGES.get(m) not in missing]
        for kind in a.data.split(","):
            measure(kind, N, chosen, a.rounds, N <= 50_000, a.components)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
