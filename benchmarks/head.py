"""VLAD forward and backward against the textbook's, and the whole head against its matrix products alone.

python benchmarks/head.py [--repeats 5] [--threads N] [--compile] [--out FOLDER]

B 8, T 25, K 64, D 512, N 49, U 256. "Textbook" subtracts each centre from each descriptor, by a loop over clusters or
at once, and leaves the rest to autograd. "Products alone" are all matrix products that the head needs, at their sizes
and in their precision, into memory that is there already: VLAD's six (assignment and sums; gradients of memberships,
descriptors, twice, and W), the GRU's six (of inputs and states, step after step, forward; the same backward; both
weights' gradients) and the classifier's three. Every tensor's gradient is asked for, as in stage 2. Seconds are of one
process, in turn; `cpu` is processor time, which other work on the machine disturbs less. Memory is the peak of a
process of its own above its inputs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.harness import Figures, interleaved, machine_facts, peak_mb, timed, write_results
from tavlad.config import ModelConfig
from tavlad.memory import keep_freed_memory
from tavlad.model import FrameMaps, TaVlad
from tavlad.parallel import autocast, quick_precision
from tavlad.vlad import Vlad

B, T, K, D, N, U, A = 8, 25, 64, 512, 49, 256, 51
_CPU = torch.device("cpu")
Run = Callable[[], object]


# --- the textbook


def by_clusters(vlad: Vlad, x_BTND: Tensor, attention_BTN: Tensor) -> Tensor:
    """Eq. 1 read aloud: for each cluster, the sum of weighted residuals."""
    assign_BTNK = vlad.assign(x_BTND) * attention_BTN[..., None]
    sums = [
        (assign_BTNK[..., k, None] * (x_BTND - centre_D)).sum(dim=2) for k, centre_D in enumerate(vlad.centres.unbind())
    ]
    return torch.stack(sums, dim=2)


def by_residuals(vlad: Vlad, x_BTND: Tensor, attention_BTN: Tensor) -> Tensor:
    """The same by one tensor of all residuals, (B, T, N, K, D)."""
    assign_BTNK = vlad.assign(x_BTND) * attention_BTN[..., None]
    return (assign_BTNK[..., None] * (x_BTND[..., None, :] - vlad.centres)).sum(dim=2)


def plain(vlad: Vlad, x_BTND: Tensor, attention_BTN: Tensor) -> Tensor:
    """A^T x - (sum a) c, with autograd's gradients."""
    assign_BTNK = vlad.assign(x_BTND) * attention_BTN[..., None]
    weighted_BTKD = torch.einsum("btnk,btnd->btkd", assign_BTNK, x_BTND)
    return weighted_BTKD - assign_BTNK.sum(dim=2)[..., None] * vlad.centres


class TextbookHead(nn.Module):
    """The textbook's VLAD, torch's GRU and autograd."""

    def __init__(self, model: TaVlad) -> None:
        super().__init__()
        assert model.vlad is not None
        assert model.gru is not None
        self.vlad, self.gru, self.classifier = model.vlad, model.gru, model.classifier

    def forward(self, maps: FrameMaps) -> Tensor:
        assert maps.attention_BTN is not None
        with torch.autocast("cpu", enabled=False):
            vlad_BTKD = by_clusters(self.vlad, maps.descriptors_BTND, maps.attention_BTN)
        states_STU, _ = self.gru(vlad_BTKD.transpose(1, 2).flatten(0, 1))
        clip_BKU = nn.functional.normalize(states_STU[:, -1].float().unflatten(0, vlad_BTKD.shape[::2]), dim=-1)
        video = nn.functional.normalize(clip_BKU.flatten(1), dim=-1)
        with torch.autocast("cpu", enabled=False):
            return self.classifier(nn.functional.dropout(video))


# --- inputs


def _inputs() -> tuple[Tensor, Tensor]:
    """Descriptors like a trunk's and their attention."""
    torch.manual_seed(0)
    x_BTND = nn.functional.normalize(torch.randn(B, T, N, D), dim=-1)
    return x_BTND.requires_grad_(), torch.rand(B, T, N).requires_grad_()


def _vlad() -> Vlad:
    torch.manual_seed(1)
    vlad = Vlad(K, D)
    vlad.initialise(nn.functional.normalize(torch.randn(K, D), dim=-1), 1000.0)
    return vlad


def _model() -> TaVlad:
    torch.manual_seed(2)
    model = TaVlad(ModelConfig(trunk="resnet18", weights="none"), A).train()
    model.trunk.requires_grad_(False)
    model.vlad = _vlad()
    return model


def _vlad_step(forward: Callable[[Vlad, Tensor, Tensor], Tensor], out: Tensor) -> Run:
    vlad, (x_BTND, attention_BTN) = _vlad(), _inputs()

    def run() -> list[Tensor]:
        vlad.zero_grad()
        x_BTND.grad = attention_BTN.grad = None
        forward(vlad, x_BTND, attention_BTN).backward(out)
        return [x_BTND, attention_BTN, *vlad.parameters()]

    return run


def _head_step(head: Callable[[FrameMaps], Tensor], weights: nn.Module, precision: str) -> Run:
    x_BTND, attention_BTN = _inputs()
    labels_B = torch.arange(B)

    def run() -> None:
        weights.zero_grad()
        x_BTND.grad = attention_BTN.grad = None
        with autocast(_CPU, precision):
            logits_BA = head(FrameMaps(descriptors_BTND=x_BTND, attention_BTN=attention_BTN))
        nn.functional.cross_entropy(logits_BA.float(), labels_B).backward()

    return run


# --- the limit


def _vlad_products() -> Run:
    x_FND, weight_KD = torch.randn(B * T, N, D), torch.randn(K, D)
    assign_FNK, d_sums_FKD = torch.randn(B * T, N, K), torch.randn(B * T, K, D)
    of_x_FND, of_sums_FKD = torch.empty_like(x_FND), torch.empty_like(d_sums_FKD)
    of_assign_FNK, of_weight_KD = torch.empty_like(assign_FNK), torch.empty_like(weight_KD)

    def run() -> None:
        torch.mm(x_FND.flatten(0, 1), weight_KD.T, out=of_assign_FNK.view(-1, K))
        torch.bmm(assign_FNK.transpose(1, 2), x_FND, out=of_sums_FKD)
        torch.bmm(x_FND, d_sums_FKD.transpose(1, 2), out=of_assign_FNK)
        torch.bmm(assign_FNK, d_sums_FKD, out=of_x_FND)
        torch.mm(assign_FNK.flatten(0, 1), weight_KD, out=of_x_FND.view(-1, D))
        torch.mm(assign_FNK.flatten(0, 1).T, x_FND.flatten(0, 1), out=of_weight_KD)

    return run


def _gru_products(dtype: torch.dtype) -> Run:
    x_MD, states_TSU = torch.randn(T * B * K, D, dtype=dtype), torch.randn(T, B * K, U, dtype=dtype)
    gates_TSG = torch.randn(T, B * K, 3 * U, dtype=dtype)
    w_ih, w_hh = torch.randn(3 * U, D, dtype=dtype), torch.randn(3 * U, U, dtype=dtype)
    gates_MG = gates_TSG.flatten(0, 1)
    of_gates_MG, of_state_SU, of_x_MD = torch.empty_like(gates_MG), torch.empty_like(states_TSU[0]), x_MD.clone()
    of_hidden_SG, of_ih, of_hh = torch.empty_like(gates_TSG[0]), torch.empty_like(w_ih), torch.empty_like(w_hh)

    def run() -> None:
        torch.mm(x_MD, w_ih.T, out=of_gates_MG)
        for step in range(1, T):  # the state before the first step is zero
            torch.mm(states_TSU[step], w_hh.T, out=of_hidden_SG)
        for step in range(1, T):
            torch.mm(gates_TSG[step], w_hh, out=of_state_SU)
        torch.mm(gates_MG, w_ih, out=of_x_MD)
        torch.mm(gates_MG.T, x_MD, out=of_ih)
        torch.mm(gates_MG.T, states_TSU.flatten(0, 1), out=of_hh)

    return run


def _classifier_products() -> Run:
    video, weight, d_logits_BA = torch.randn(B, K * U), torch.randn(A, K * U), torch.randn(B, A)

    def run() -> None:
        torch.mm(video, weight.T)
        torch.mm(d_logits_BA, weight)
        torch.mm(d_logits_BA.T, video)

    return run


def _all(runs: Sequence[Run]) -> Run:
    def run() -> None:
        for each in runs:
            each()

    return run


# --- measuring


def _vlad_variants(compiled: bool) -> dict[str, Callable[[], Run]]:
    out = torch.randn(B, T, K, D, generator=torch.Generator().manual_seed(3))
    variants: dict[str, Callable[[], Run]] = {
        "tavlad": lambda: _vlad_step(lambda vlad, *inputs: vlad(*inputs), out),
        "products alone": _vlad_products,
        "A^T x - (sum a) c, autograd": lambda: _vlad_step(plain, out),
        "textbook, loop over clusters": lambda: _vlad_step(by_clusters, out),
        "textbook, residual tensor": lambda: _vlad_step(by_residuals, out),
    }
    if compiled:
        variants["A^T x - (sum a) c, torch.compile"] = lambda: _vlad_step(torch.compile(plain), out)
        variants["residual tensor, torch.compile"] = lambda: _vlad_step(torch.compile(by_residuals), out)
    return variants


def _head_variants(precision: str, compiled: bool) -> dict[str, Callable[[], Run]]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def ours() -> Run:
        model = _model()
        return _head_step(model.classify, model, precision)

    def textbook() -> Run:
        head = TextbookHead(_model())
        return _head_step(head, head, precision)

    def compiled_head() -> Run:
        model = _model()
        return _head_step(torch.compile(model.classify), model, precision)

    variants = {
        "tavlad": ours,
        "products alone": lambda: _all([_vlad_products(), _gru_products(dtype), _classifier_products()]),
        "textbook": textbook,
    }
    if compiled:
        variants["torch.compile"] = compiled_head
    return variants


def _warm(make: Callable[[], Run]) -> tuple[Run, float]:
    """A variant after its first run, and how long that took."""
    run, began = make(), time.perf_counter()
    run()
    return run, time.perf_counter() - began


def _memory_child(table: str, name: str) -> None:
    """Prints the peak above the inputs of one step, gradients included, in MB."""
    torch.set_num_threads(1)
    small = torch.randn(64, 64, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):  # libraries load themselves at their first product
        (small.to(dtype) @ small.to(dtype)).softmax(dim=-1).sum().backward()
    run = _tables(compiled=False)[table][name]()
    print(json.dumps(peak_mb(run)))


def _peak_mb(table: str, name: str) -> float:
    command = [sys.executable, __file__, "--memory-of", table, name]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return float(json.loads(ended.stdout.splitlines()[-1]))


def _tables(compiled: bool) -> dict[str, dict[str, Callable[[], Run]]]:
    tables = {"vlad": _vlad_variants(compiled), "head float32": _head_variants("float32", compiled)}
    if quick_precision("cpu") == "bf16":  # without instructions for it, a textbook step takes 20 s
        tables["head bf16"] = _head_variants("bf16", compiled)
    return tables


def _check() -> None:
    """All forms of the VLAD layer are one function with the same gradients."""
    out = torch.randn(B, T, K, D, generator=torch.Generator().manual_seed(3))
    expected, found = (_vlad_step(each, out)() for each in (by_clusters, lambda vlad, *inputs: vlad(*inputs)))
    assert isinstance(expected, list)
    assert isinstance(found, list)
    for of_expected, of_found in zip(expected, found, strict=True):
        assert (of_expected.grad - of_found.grad).norm() < 1e-4 * of_expected.grad.norm()


def _measure(table: str, variants: dict[str, Callable[[], Run]], repeats: int, memory: bool) -> dict[str, Figures]:
    warm = {name: _warm(make) for name, make in variants.items()}
    rows = interleaved({name: lambda run=run: timed(run) for name, (run, _) in warm.items()}, repeats)
    limit, ours = rows["products alone"], rows["tavlad"]
    for name, row in rows.items():
        row["of_the_products"] = row["ms"] / limit["ms"]
        row["of_the_products_by_cpu"] = row["cpu_ms"] / limit["cpu_ms"]
        row["tavlad_is_quicker"] = row["ms"] / ours["ms"]
        row["first_run_s"] = warm[name][1]
        if memory and name != "products alone" and "compile" not in name:
            row["peak_mb"] = _peak_mb(table, name)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="also what torch.compile makes of it (a minute more)")
    parser.add_argument("--only", default="", help="tables whose names contain this: vlad, head bf16, head float32")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, measured in other processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _memory_child(*options.memory_of)
        return
    torch.set_num_threads(options.threads)
    keep_freed_memory(_CPU)  # as fit does
    _check()
    tables = {name: table for name, table in _tables(options.compile).items() if options.only in name}
    found = {
        name: _measure(name, variants, options.repeats, not options.no_memory) for name, variants in tables.items()
    }
    facts = {"B": B, "T": T, "K": K, "D": D, "N": N, "U": U, "threads": options.threads, "repeats": options.repeats}
    write_results(options.out, "head", facts | machine_facts(("torch",)), found)


if __name__ == "__main__":
    main()
