"""Sections a to c: the device's kernels and models against the CPU's."""

import contextlib
import copy
import functools
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gpu import shapes
from gpu.record import Job, Section
from halfbyte import hf, kernels, optim
from halfbyte.hf.layers.attention import RangedMask, attention_forward
from halfbyte.hf.layers.families import FAMILIES
from halfbyte.kernels import AdamwStep, gpu, reference
from halfbyte.nn import LowRank, Projection, linear_cross_entropy, lora_linear
from halfbyte.nn.attention import attention, key_ranges
from halfbyte.nn.segments import attention_over_segments, segments_of
from halfbyte.quant import QuantizedWeight, codebook, quantize_4bit, quantize_int8

TYPES = ("nf4", "fp4", "e2m1", "e3m0", "int4")
SIZES = ((64, 128), (96, 80), (33, 65), (7, 3), (1, 1), (256, 1088))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative distance in the 2-norm: the weight and the result are each rounded once, by half of this at most."""
STEP = AdamwStep(3, 1e-2, (0.9, 0.99), 1e-8, 0.1)


@contextlib.contextmanager
def under_test(job: Job) -> Iterator[None]:
    """Compute with the kernels that are checked."""
    with kernels.use_provider(job.provider) if job.provider else contextlib.nullcontext():
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal values on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the relative distance in the 2-norm."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    norm = float(expected.norm())
    return float((got - expected).norm()) / norm if norm else float((got - expected).norm())


def differing(got: Tensor, expected: Tensor) -> int:
    """Return how many elements differ."""
    return int((got.cpu() != expected.cpu()).sum())


def bytes_and_products(job: Job, section: Section) -> None:
    """a: bytes, products, gradients, optimizer and pieces of a step against the CPU's reference."""
    for name, function in (
        ("quantize", _quantize), ("int8", _int8), ("products", _products), ("lora", _lora), ("adamw", _adamw),
        ("head", _head), ("pieces", _pieces), ("attention", _attention), ("there and back", _there_and_back),
    ):  # fmt: skip
        with section.part(name, job):
            function(job, section)


def _reference(tensor: Tensor, *options: Any) -> QuantizedWeight:
    with kernels.use_provider("reference"):
        return quantize_4bit(tensor, *options)


def _quantize(job: Job, section: Section) -> None:
    for kind in TYPES:
        worst = {"codes": 0, "constants": 0, "nested_codes": 0, "nested": 0, "values": 0.0}
        for rows, columns in SIZES:
            for blocksize in (64, 256):
                for double in (False, True):
                    dense = random(rows, columns, seed=rows, dtype=torch.bfloat16)
                    expected = _reference(dense, kind, blocksize, double)
                    with under_test(job):
                        got = quantize_4bit(dense.to(job.device), kind, blocksize, double)
                        same = expected.to(job.device)
                        for dtype in DTYPES:
                            with kernels.use_provider("reference"):
                                values = expected.dequantize(dtype)
                            worst["values"] = max(worst["values"], distance(same.dequantize(dtype), values))
                    # fp4 has two codes for zero
                    worst["codes"] += differing(_codes(got), _codes(expected))
                    mine, theirs = got.statistics, expected.statistics
                    worst["nested_codes" if double else "constants"] += differing(mine.absmax, theirs.absmax)
                    if mine.nested and theirs.nested:
                        worst["nested"] += differing(mine.nested.absmax, theirs.nested.absmax)
        # bitsandbytes' CPU library takes the second nearest of one 8-bit code in 500; CUDA should take none
        exact = worst["codes"] == worst["constants"] == 0 and (not job.on_gpu or worst["nested_codes"] == 0)
        section.check(f"{kind}: bytes are the reference's", exact and worst["values"] < 1e-3, **worst)


def _codes(weight: QuantizedWeight) -> Tensor:
    packed, table = weight.packed.view(-1).cpu(), weight.statistics.code.cpu()
    halves = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: weight.numel()]
    return table[halves.long()]


def _int8(job: Job, section: Section) -> None:
    for rows, columns in SIZES:
        dense = random(rows, columns, seed=rows)
        with kernels.use_provider("reference"):
            expected = quantize_int8(dense, 64)
        with under_test(job):
            got = quantize_int8(dense.to(job.device), 64)
        section.check(f"int8 {rows}x{columns}: codes are the reference's", not differing(got.codes, expected.codes))


def _products(job: Job, section: Section) -> None:
    for kind in ("nf4", "fp4", "int4"):
        for dtype in DTYPES:
            worst = dict.fromkeys(("forward", "gradient"), 0.0)
            for out_features, in_features in SIZES:
                weight = _reference(random(out_features, in_features), kind, 64, True)
                dense = reference.dequantize_4bit(weight, torch.float32).double()
                for rows in (1, 5, 130):
                    x = random(rows, in_features, seed=1, dtype=dtype)
                    dy = random(rows, out_features, seed=2, dtype=dtype)
                    moved = x.to(job.device, copy=True).requires_grad_()
                    with under_test(job):
                        y = kernels.matmul_4bit(moved, weight.to(job.device))
                        y.backward(dy.to(job.device))
                    worst["forward"] = max(worst["forward"], distance(y, x.double() @ dense.T))
                    assert moved.grad is not None
                    worst["gradient"] = max(worst["gradient"], distance(moved.grad, dy.double() @ dense))
            name = str(dtype).removeprefix("torch.")
            section.check(f"{kind} {name}: products", max(worst.values()) < 2 * BOUNDS[dtype], **worst)


def _lora(job: Job, section: Section) -> None:
    """Three projections of one input, as queries, keys and values, and one alone; gradients in fp64 as the oracle."""
    for dtype in DTYPES:
        for count in (1, 3):
            weights = [_reference(random(96, 128, seed=i), "nf4", 64, True) for i in range(count)]
            factors = [(random(8, 128, seed=20 + i), random(96, 8, seed=30 + i)) for i in range(count)]
            x, dy = random(130, 128, seed=3, dtype=dtype), random(130, 96, seed=4, dtype=dtype)
            leaves = [x.to(job.device), *(f.to(job.device) for pair in factors for f in pair)]
            true = [leaf.cpu().double().requires_grad_() for leaf in leaves]
            for leaf in leaves:
                leaf.requires_grad_()
            projections = [
                Projection(w.to(job.device), None, [LowRank(leaves[1 + 2 * i], leaves[2 + 2 * i], 2.0)])
                for i, w in enumerate(weights)
            ]
            with under_test(job):
                ys = lora_linear(leaves[0], projections)
                sum((y * dy.to(job.device)).sum() for y in ys).backward()  # type: ignore[union-attr]
            for i, weight in enumerate(weights):
                dense = reference.dequantize_4bit(weight, torch.float32).double()
                y = true[0] @ dense.T + 2 * true[0] @ true[1 + 2 * i].T @ true[2 + 2 * i].T
                (y * dy.double()).sum().backward()
                off = distance(ys[i], y)
            gradients = max(distance(a.grad, b.grad) for a, b in zip(leaves, true, strict=True))  # type: ignore[arg-type]
            name = f"LoRA over {count}, {str(dtype).removeprefix('torch.')}"
            section.check(name, max(off, gradients) < 4 * BOUNDS[dtype], forward=off, gradients=gradients)


def _adamw(job: Job, section: Section) -> None:
    signed, unsigned = codebook("dynamic", "cpu"), codebook("dynamic_unsigned", "cpu")
    for count in (256, 5000, 4096 * 4 + 17):
        p, g, m, v = (random(count, seed=i) for i in range(4))
        with kernels.use_provider("reference"):
            first = kernels.quantize_coded(m / 10, signed, 256)
            second = kernels.quantize_coded(v.square(), unsigned, 256)
        there = [x.to(job.device, copy=True) for x in (p, g, *first, *second, signed, unsigned)]
        codes = [(there[2], there[3]), (there[4], there[5])]
        with kernels.use_provider("reference"):
            kernels.adamw_8bit([p], [g], [first], [second], signed, unsigned, 256, STEP)
        with under_test(job):
            kernels.adamw_8bit([there[0]], [there[1]], [codes[0]], [codes[1]], there[6], there[7], 256, STEP)
        share = differing(there[2], first[0]) / count
        off = distance(there[0], p)
        section.check(f"AdamW in 8 bits, {count} values", off < 1e-3, distance=off, codes_differing=share)
        p, m, v = random(count), random(count, seed=2), random(count, seed=3).square()
        there = [x.to(job.device, copy=True) for x in (p, g, m, v)]
        with kernels.use_provider("reference"):
            kernels.adamw_32bit([p], [g], [m], [v], STEP)
        with under_test(job):
            kernels.adamw_32bit([there[0]], [there[1]], [there[2]], [there[3]], STEP)
        off = distance(there[0], p)
        section.check(f"AdamW in 32 bits, {count} values", off < 1e-5, distance=off)


def _head(job: Job, section: Section) -> None:
    for dtype, cap in ((torch.float32, None), (torch.float32, 30.0), (torch.bfloat16, None)):
        hidden, weight = random(70, 64, dtype=dtype), random(5001, 64, seed=1, dtype=dtype)
        labels = torch.randint(0, 5001, (70,), generator=torch.Generator().manual_seed(0))
        there = hidden.to(job.device, copy=True).requires_grad_()
        with under_test(job):
            loss = -linear_cross_entropy(there, weight.to(job.device), labels.to(job.device), cap=cap).log_prob.mean()
            loss.backward()
        true = hidden.double().requires_grad_()
        z = true @ weight.double().T
        expected = torch.nn.functional.cross_entropy(z if cap is None else cap * (z / cap).tanh(), labels)
        expected.backward()
        assert there.grad is not None and true.grad is not None
        off, gradient = abs(float(loss) / float(expected) - 1), distance(there.grad, true.grad)
        name = f"head, {str(dtype).removeprefix('torch.')}{', capped' if cap else ''}"
        section.check(name, off < 1e-2 and gradient < 4 * BOUNDS[dtype], loss=off, gradient=gradient)


def _pieces(job: Job, section: Section) -> None:
    by = "Liger" if job.on_gpu and gpu.available() else "torch"
    for dtype in DTYPES:
        x, dy, up = (random(37, 256, seed=i, dtype=dtype) for i in range(3))
        weight, worst = random(256, seed=5, dtype=dtype), {}
        with under_test(job):
            there = [tensor.to(job.device) for tensor in (x, dy, up, weight)]
            for offset, rounded in ((0.0, True), (1.0, False)):
                h, y, scale = kernels.rms_norm(there[0], there[2], there[3], eps=1e-6, offset=offset, rounded=rounded)
                dx = kernels.rms_norm_gradient(there[1], None, h, there[3], scale, offset=offset)
                expected = reference.rms_norm(x, up, weight, 1e-6, offset, rounded)
                true = reference.rms_norm_gradient(dy, None, expected[0], weight, expected[2], offset)
                worst[f"norm {offset:.0f}"] = max(distance(y, expected[1]), distance(dx, true))
            for name in ("silu", "gelu_tanh"):
                y = kernels.gated(there[0], there[2], name)
                gradients = kernels.gated_gradient(there[1], there[0], there[2], name)
                mine = torch.empty_like(x), torch.empty_like(x)
                reference.gated_gradient(dy, x, up, name, *mine)
                pairs = [(y, reference.gated(x, up, name)), *zip(gradients, mine, strict=True)]
                worst[name] = max(distance(a, b) for a, b in pairs)
            heads = random(2, 9, 4, 32, seed=7, dtype=dtype)
            half = random(2, 9, 16, seed=8)
            cos, sin = (torch.cat([f(half)] * 2, -1) for f in (torch.cos, torch.sin))
            for inverse in (False, True):
                got = kernels.rotary(heads.to(job.device), cos.to(job.device), sin.to(job.device), inverse=inverse)
                worst[f"rotary{' back' * inverse}"] = distance(got, reference.rotary(heads, cos, sin, inverse))
        name = f"pieces by {by}, {str(dtype).removeprefix('torch.')}"
        section.check(name, max(worst.values()) < 2 * BOUNDS[dtype], **worst)


def _attention(job: Job, section: Section) -> None:
    """Packed and padded rows over segments, against the formula in fp32."""
    numbers = torch.tensor([[0] * 5 + [1] * 9 + [2]])
    padded = torch.ones(2, 15, dtype=torch.bool)
    padded[0, 11:] = False
    for name, batch, options in (
        ("packed", 1, {"segments": numbers}), ("padded", 2, {"real": padded}), ("whole", 2, {}),
    ):  # fmt: skip
        ranges = key_ranges((batch, 15, 15), ahead=0, **options)
        assert ranges is not None
        segments = segments_of(ranges)
        assert segments is not None
        tensors = [random(batch, heads, 15, 32, seed=heads, dtype=torch.bfloat16) for heads in (4, 2, 2)]
        there = [x.to(job.device, copy=True).requires_grad_() for x in tensors]
        y = attention_over_segments(*there, segments, None)  # type: ignore[arg-type]
        true = [x.float().requires_grad_() for x in tensors]
        with kernels.use_provider("reference"):
            expected = attention(*true, ranges).transpose(1, 2)  # type: ignore[arg-type]
        dy = random(*expected.shape, seed=9)
        (y * dy.to(job.device, y.dtype)).sum().backward()
        (expected * dy).sum().backward()
        gradients = max(distance(a.grad, b.grad) for a, b in zip(there, true, strict=True))  # type: ignore[arg-type]
        off = distance(y, expected)
        section.check(f"attention, {name}", max(off, gradients) < 4 * 2**-7, forward=off, gradients=gradients)
        if name == "packed":
            mask = RangedMask(ranges, 15, job.device)
            mask.segments = segments
            module = torch.nn.Module()
            again, _ = attention_forward(module, *[x.detach() for x in there], mask)  # type: ignore[arg-type]
            section.check("attention by transformers' interface", distance(again, expected) < 4 * 2**-7)


def _there_and_back(job: Job, section: Section) -> None:
    """Training, evaluation with a few rows, and training again leave gradients and bytes as they were."""
    sizes = shapes.SHAPES["135M"].tiny()
    with under_test(job):
        model, _ = shapes.ours(sizes, job, 4, recompute=False)
        ids = shapes.tokens(sizes, 2, 40, job.device)
        before = _gradients(model, ids), {key: x.clone() for key, x in model.state_dict().items()}
        model.eval()
        with torch.no_grad():
            for length in (1, 3, 40):
                model(input_ids=ids[:, :length])
            model.generate(input_ids=ids[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
        model.train()
        after = _gradients(model, ids), model.state_dict()
    alike = [all(torch.equal(one[key], other[key]) for key in one) for one, other in zip(before, after, strict=True)]
    section.check("training, evaluation, training", all(alike), gradients=alike[0], state_dict=alike[1])


def _gradients(model: Any, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=inputs.pop("labels", ids), use_cache=False, **inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 16}, "Gemma2": {"head_dim": 16}, "Gemma3": {"head_dim": 16}, "Ministral": {"head_dim": 16},
}  # fmt: skip


def _config(name: str) -> Any:
    kind = getattr(t, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    return kind(**SMALL, **OWN.get(name, {}))


def families(job: Job, section: Section) -> None:
    """b: a tiny model of each family: loss and LoRA gradients against the CPU's."""
    names = [family.name for family in FAMILIES.values()]
    for name in names[:2] if job.tiny else names:
        with section.part(name, job), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            dense = t.AutoModelForCausalLM.from_config(_config(name))
            for parameter in dense.parameters():
                torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
            dense.save_pretrained(folder)
            for dtype in (torch.float32, torch.bfloat16):
                _compare(job, section, name, folder, dtype)


def _compare(job: Job, section: Section, name: str, folder: str, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    with kernels.use_provider("reference"):
        mine = _loaded(folder, dtype, cpu)
    with under_test(job):
        theirs = _loaded(folder, dtype, job.device)
    theirs.load_state_dict({k: x for k, x in mine.state_dict().items() if "lora_" in k}, strict=False)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[0, 17:] = 0
    labels = ids.masked_fill(real == 0, -100)
    packed = ids.reshape(1, -1)
    positions = torch.cat([torch.arange(11), torch.arange(29), torch.arange(8)]).unsqueeze(0)
    of_packed = packed.masked_fill(positions == 0, -100)
    for way, inputs in (
        ("padded", (ids, {"attention_mask": real, "labels": labels})),
        ("packed", (packed, {"position_ids": positions, "labels": of_packed})),
    ):
        with kernels.use_provider("reference"):
            expected = _gradients(mine, inputs[0], **inputs[1])
        moved = {key: x.to(job.device) for key, x in inputs[1].items()}
        with under_test(job):
            got = _gradients(theirs, inputs[0].to(job.device), **moved)
        worst = max(distance(got[key], expected[key]) for key in expected if key != "loss")
        loss = abs(float(got["loss"]) / float(expected["loss"]) - 1)
        # bf16: as far from the CPU's bf16 as two ways of rounding are from each other
        holds = loss < 1e-4 and worst < 1e-3 if dtype == torch.float32 else loss < 2e-2 and worst < 0.25
        kind = str(dtype).removeprefix("torch.")
        layers, attends = hf.describe_layers(theirs), hf.describe_attention(theirs)
        section.check(
            f"{name} {way} {kind}", holds and got.keys() == expected.keys(), loss=loss, gradients=worst,
            layers=layers, attention=attends,
        )  # fmt: skip


def _loaded(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    config = hf.HalfbyteConfig(compute_dtype=dtype)
    model = hf.load(folder, quantization_config=config, device=device.type)  # type: ignore[arg-type]
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return hf.prepare(get_peft_model(model, lora)).train()


def curve(job: Job, section: Section) -> None:
    """c: a 135M shape over fixed random weights: the loss of its steps beside the CPU's first."""
    sizes = shapes.shape("135M", job)
    steps, first = (6, 2) if job.tiny else (30, 3)
    rows, length = (2, 32) if job.tiny else (2, 256)
    losses: dict[str, list[float]] = {}
    fixed = shapes.base(sizes, torch.device("cpu"))
    bases = {"cpu": fixed, str(job.device): copy.deepcopy(fixed).to(job.device) if job.on_gpu else copy.deepcopy(fixed)}
    if not job.on_gpu:
        bases = {"cpu": fixed, f"cpu, {job.provider or 'native'}": bases[str(job.device)]}
    start = None
    for place, model in bases.items():
        device = model.model.embed_tokens.weight.device
        ours = functools.partial(shapes.ours, sizes, Job(device, job.tiny), 16, recompute=False)
        with section.part(f"steps on {place}", job), under_test(job) if place != "cpu" else contextlib.nullcontext():
            adapted, optimizer = ours(model=model)
            values = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
            if start is None:
                start = {name: p.detach().cpu().clone() for name, p in values.items()}
            with torch.no_grad():
                for name, p in values.items():
                    p.copy_(start[name])
            ids = shapes.tokens(sizes, rows, length, device)
            begun, made = time.monotonic(), []
            for _ in range(first if place == "cpu" else steps):
                made.append(shapes.step(adapted, optimizer, [ids]))
            losses[place] = made
            section.row(f"losses on {place}", losses=made, seconds=round(time.monotonic() - begun, 2))
    cpu, there = losses["cpu"], next(made for place, made in losses.items() if place != "cpu")
    off = max(abs(a / b - 1) for a, b in zip(there, cpu, strict=False))
    section.check("the first steps are the CPU's", off < 0.02, distance=off)
    falls = there[-1] < there[0] and all(map(math.isfinite, there))
    section.check("the loss falls", falls, first=there[0], last=there[-1])


def paged(job: Job, section: Section) -> None:
    """f: paged optimizer state: allocated, stepped and saved, under a tenth of the card's memory."""
    total = torch.cuda.get_device_properties(job.device).total_memory if job.on_gpu else 2**30
    count = 2**16 if job.tiny else min(2**25, total // 10 // 16)
    for bits in (8, 32):
        with section.part(f"state in {bits} bits", job), under_test(job):
            size = count * (2.03 if bits == 8 else 8)
            assert size < total / 10
            start, gradients = random(count).to(job.device), [random(count, seed=i).to(job.device) for i in (1, 2, 3)]
            results = []
            for place in (False, True):
                p = torch.nn.Parameter(start.clone())
                optimizer = optim.AdamW([p], lr=1e-2, state_bits=bits, paged=place)
                begun = time.monotonic()
                for gradient in gradients:
                    p.grad = gradient
                    optimizer.step()
                job.wait()
                section.row(f"{bits} bits, {'paged' if place else 'in memory'}", seconds=time.monotonic() - begun)
                state = {k: x.cpu() for k, x in optimizer.state[p].items() if isinstance(x, Tensor)}
                results.append((p.detach().cpu(), state, optimizer, p))
            (one, kept, *_), (other, pages, optimizer, p) = results
            same = torch.equal(one, other) and all(torch.equal(kept[key], pages[key]) for key in kept)
            section.check(f"{bits} bits: paged steps are those in memory", same, bytes=size)
            saved = optimizer.state_dict()
            again = optim.AdamW([torch.nn.Parameter(p.detach().clone())], lr=1e-2, state_bits=bits, paged=True)
            again.load_state_dict(saved)
            (state,) = again.state.values()
            whole = all(torch.equal(state[key].cpu(), pages[key]) for key in pages)
            section.check(f"{bits} bits: saved and read again", whole)
